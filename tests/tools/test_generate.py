import subprocess
import sys
from pathlib import Path

from qgalore.data.tokenizer import train_tokenizer
from qgalore.files import export_hf

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate.py"


def generate(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_continues_a_prompt_the_same_way_twice(tiny_llama, tmp_path):
    tokenizer = train_tokenizer(["a little text"] * 5, vocab_size=300, report=lambda line: None)
    export_hf.save(tiny_llama(vocab_size=320), tokenizer, tmp_path)
    first, again = (generate(tmp_path, "--prompt", "a little", "--max-new-tokens", 5) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("a little")
    assert first.stdout == again.stdout


def test_a_folder_without_a_model_is_named(tmp_path):
    answer = generate(tmp_path, "--prompt", "x")
    assert answer.returncode == 2
    assert "has no config.json" in answer.stderr


def test_a_run_is_answered_with_its_export(tmp_path):
    (tmp_path / "run" / "export" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    for folder in ("run", "run/checkpoints/step-00000001"):
        answer = generate(tmp_path / folder, "--prompt", "x")
        assert answer.returncode == 2
        assert f"Name {tmp_path / 'run' / 'export' / 'hf'}." in answer.stderr
