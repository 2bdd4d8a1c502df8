"""The keys that decide how a step is computed, through the whole program."""


def test_kernels_that_cannot_run_are_refused_before_training(tiny_run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _, err = tiny_run("kernels=triton")
    assert code == 2
    assert "kernels is 'triton', but Triton" in err
    assert "set kernels to auto or reference" in err


def test_the_choice_of_kernels_changes_nothing_on_a_cpu(tiny_run, tmp_path):
    for name in ("auto", "reference"):
        code, out, err = tiny_run(f"kernels={name}", f"run.name={name}", "train.max_steps=2")
        assert code == 0, err
        assert "kernels:" not in out
    weights = [
        next((tmp_path / "runs" / name / "checkpoints").glob("*2/model.safetensors")).read_bytes()
        for name in ("auto", "reference")
    ]
    assert weights[0] == weights[1]
