"""The program ``qgalore`` and its doors: what they list, what their help shows, and what a command brings with it."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import qgalore
from qgalore.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOORS = {
    "train": "train.py",
    "evaluate": "tools/evaluate.py",
    "generate": "tools/generate.py",
    "export": "tools/export.py",
    "convergence": "tools/convergence.py",
    "compare": "tools/compare_methods.py",
}


def leave(arguments, capfd) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command that argparse ends."""
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    output = capfd.readouterr()
    return ended.value.code or 0, output.out, output.err


def examples(shown: str) -> list[str]:
    return [line.strip() for line in shown.partition("examples:\n")[2].splitlines() if line.strip()]


def test_help_lists_every_command_with_a_line(capfd):
    code, shown, _ = leave(["--help"], capfd)
    assert code == 0
    for name, does in main.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(does)}$", shown, re.MULTILINE)
    assert main.main([]) == 0
    assert capfd.readouterr().out == shown


def test_the_version_is_that_of_the_package(capfd):
    assert leave(["--version"], capfd)[:2] == (0, f"qgalore {qgalore.__version__}\n")
    assert f'\nversion = "{qgalore.__version__}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_an_unknown_command_is_answered_with_the_known_ones(capfd):
    code, _, told = leave(["trian"], capfd)
    assert code == 2
    assert "'trian'" in told
    assert "'train'" in told


@pytest.mark.parametrize("command", main.COMMANDS)
def test_each_help_shows_two_examples_that_the_command_takes(command, capfd):
    code, shown, _ = leave([command, "--help"], capfd)
    assert code == 0
    assert shown.startswith(f"usage: qgalore {command} ")
    found = examples(shown)
    assert len(found) == 2
    for line in found:
        program, name, *arguments = shlex.split(line)
        assert (program, name) == ("qgalore", command)
        import_module(f"qgalore.cli.{command}").parse(arguments, "qgalore")  # leaves with 2 if it does not know one


@pytest.mark.parametrize(("command", "file"), DOORS.items())
def test_a_door_is_a_few_lines_that_open_the_same_function(command, file):
    """With the name by which it was called in its help and examples."""
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) < 20
    answer = subprocess.run([sys.executable, str(ROOT / file), "--help"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith(f"usage: python {file} ")
    assert all(line.startswith(f"python {file} ") for line in examples(answer.stdout))


def test_a_command_that_answers_at_once_imports_nothing_heavy():
    code = (
        "import sys; from qgalore.cli import main\n"
        "try: main.main(['train', '--config'])\n"
        "except SystemExit as ended: assert ended.code == 2\n"
        "assert not {'torch', 'transformers', 'pydantic', 'qgalore.cli.compare'} & set(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr


def test_errors_keep_their_codes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for arguments, told in (
        (["train", "--config", "nowhere"], "--config nowhere: no such file"),
        (["plan", "--config", "quickstart", "train.lr=-1"], "train.lr is -1"),
        (["evaluate", "nowhere", "--text", "x"], "nowhere does not exist"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is not an exported model"),
        (["export", "nowhere", "--format", "hf", "--out", "x"], "nowhere does not exist"),
        (["convergence", "nowhere"], "nowhere does not exist"),
        (["compare", "--config", "quickstart", "--seeds", "x"], "--seeds is x"),
    ):
        assert main.main(arguments) == 2
        assert told in capfd.readouterr().err


def test_plan_is_what_train_plans(tiny_run, capfd):
    code, planned, _ = tiny_run("--plan", "--world-size", "2", "train.grad_accumulation=2")
    assert code == 0
    assert main.main(["plan", "--config", "tiny.yaml", "--world-size", "2", "train.grad_accumulation=2"]) == 0
    again = capfd.readouterr().out
    measured = ("tokenizer", "memory:", "outside", "total")  # this process grows, and the first plan trains a tokenizer
    steady = [
        [line for line in text.splitlines() if not any(word in line for word in measured)] for text in (planned, again)
    ]
    assert steady[0] == steady[1]
    assert "all-reduce Δ gradients" in again
    assert not Path("runs").exists()
