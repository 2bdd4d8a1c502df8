"""Options that cannot work together are refused by the plan and before a run trains, in one line."""

import json

import pytest

MIXTURE = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "vocab_size": 512, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def mixture(tmp_path):
    """Arguments that put a mixture of experts in the place of the tiny Llama."""
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture" / "config.json").write_text(json.dumps(MIXTURE))
    return ("model.config=mixture", "model.overrides={}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "model.compile=blocks"), "set model.compile=none"),
        (("export.formats=[hf,int8]",), "export.formats is ['hf', 'int8']: MixtralForCausalLM is a mixture"),
        (("export.formats=[gguf]",), "not mixtral; export with --format hf"),
    ],
)
def test_what_a_mixture_cannot_have(tiny_run, tmp_path, mixture, arguments, message):
    pytest.importorskip("gguf")
    code, _, err = tiny_run(*mixture, *arguments)
    assert code == 2
    assert message in err
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))  # found before anything is trained


@pytest.mark.parametrize(
    ("parallel", "sent"),
    [("replicate", "all-reduce Δ gradients"), ("shard", "reduce Δ gradients")],
)
def test_several_processes_plan_a_mixture(tiny_run, mixture, parallel, sent):
    two = ("--plan", "--world-size=2", "train.grad_accumulation=2")
    code, out, err = tiny_run(*mixture, *two, f"parallel={parallel}")
    assert code == 0, err
    assert sent in out


@pytest.mark.parametrize("arguments", [("--plan", "--world-size=0"), ("--world-size=2",)])
def test_a_world_size_that_means_nothing_is_refused(tiny_run, arguments):
    with pytest.raises(SystemExit) as stopped:
        tiny_run(*arguments)
    assert stopped.value.code == 2


def test_a_plan_names_the_keys_without_effect(tiny_run):
    code, out, err = tiny_run("--plan", "lowrank.policy=fixed", "lowrank.cos_threshold=0.3")
    assert code == 0, err
    (note,) = (line for line in out.splitlines() if line.endswith("no effect with policy: fixed"))
    assert "lowrank.cos_threshold" in note
