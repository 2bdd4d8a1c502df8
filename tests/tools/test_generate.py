"""``tools/generate.py`` is ``qgalore generate``, which is called here without a process of its own."""

import pytest

from qgalore.cli.generate import main
from qgalore.data.tokenizer import train_tokenizer
from qgalore.files import export_hf


@pytest.fixture
def generate(capfd):
    """A function (arguments…) → (exit code, standard output, standard error)."""

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        output = capfd.readouterr()
        return code, output.out, output.err

    return run


def test_it_continues_a_prompt_the_same_way_twice(generate, tiny_llama, tmp_path):
    tokenizer = train_tokenizer(["a little text"] * 5, vocab_size=300, report=lambda line: None)
    export_hf.save(tiny_llama(vocab_size=320), tokenizer, tmp_path)
    (code, first, err), again = (generate(tmp_path, "--prompt", "a little", "--max-new-tokens", 5) for _ in range(2))
    assert code == 0, err
    assert first.startswith("a little")
    assert first == again[1]


def test_a_folder_without_a_model_is_named(generate, tmp_path):
    code, _, err = generate(tmp_path, "--prompt", "x")
    assert code == 2
    assert "has no config.json" in err


def test_a_run_is_answered_with_its_export(generate, tmp_path):
    (tmp_path / "run" / "export" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    for folder in ("run", "run/checkpoints/step-00000001"):
        code, _, err = generate(tmp_path / folder, "--prompt", "x")
        assert code == 2
        assert f"Name {tmp_path / 'run' / 'export' / 'hf'}." in err
