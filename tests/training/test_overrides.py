"""What a run may change of a pretrained model's config.json: whatever leaves all of its tensors as they are."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from qgalore.errors import ConfigError
from qgalore.models import loading
from qgalore.training import assemble
from tests.helpers import final_state, stored_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "llama": LlamaConfig(**SMALL, vocab_size=320, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SMALL, vocab_size=96, max_position_embeddings=64, num_key_value_heads=2),
    "gemma3": Gemma3TextConfig(**SMALL, vocab_size=96, head_dim=16, num_key_value_heads=1),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "mixtral": MixtralConfig(**SMALL, vocab_size=96, num_local_experts=2, num_key_value_heads=2),
}  # fmt: skip
YARN = "model.overrides.rope_scaling={rope_type: yarn, factor: 4.0}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A function kind → the folder of such a small model with a tokenizer."""
    return partial(stored_model, tmp_path_factory.mktemp("models"), KINDS)


@pytest.fixture
def continued(tiny_run, stored):
    """A function (overrides…) → what ``train.py`` gives that continues the small Llama."""
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"text": f"the sea {n} and more of it " * 8}) + "\n" for n in range(60))
    )
    pretrained = ("model.config=null", "model.overrides={}", f"model.path={stored('llama')}", "data.train=rows.jsonl")
    quick = ("train.max_steps=2", "train.eval_every=2", "lowrank.rank=4", "sample.max_new_tokens=0")
    return lambda *more: tiny_run(*pretrained, *quick, *more)


@pytest.mark.parametrize(
    ("kind", "overrides", "lines"),
    [
        ("llama", {"attention_dropout": 0.25}, ["attention_dropout: 0.0 → 0.25 (model.overrides)"]),
        ("llama", {"attention_dropout": 0.0},
         ["attention_dropout is 0.0 already, so model.overrides changes nothing there"]),
        ("llama", {"rope_theta": 5e5}, ["rope_parameters: {'rope_theta': 10000.0, 'rope_type': 'default'} → "
                                        "{'rope_theta': 500000.0, 'rope_type': 'default'} (model.overrides)"]),
        ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.5},
         ["attn_pdrop: 0.1 → 0.0 (model.overrides)", "resid_pdrop: 0.1 → 0.5 (model.overrides)"]),
        ("mixtral", {"router_aux_loss_coef": 0.5, "output_router_logits": True},
         ["output_router_logits: False → True (model.overrides)",
          "router_aux_loss_coef: 0.001 → 0.5 (model.overrides)"]),
        ("gemma3", {"sliding_window": 8}, ["sliding_window: 4096 → 8 (model.overrides)"]),
    ],
)  # fmt: skip
def test_what_leaves_the_tensors_may_change(stored, kind, overrides, lines):
    said = []
    model = loading.pretrained_skeleton(stored(kind), dtype=torch.float32, overrides=overrides, report=said.append)
    assert said == lines
    for name, value in overrides.items():
        assert getattr(model.config, name, value) == value


def test_layers_get_their_windows_from_the_fields_that_say_so(stored):
    """A stored list of layers' kinds, which follows from other fields, follows from them again."""
    overrides = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = loading.pretrained_config(stored("qwen2"), overrides)
    assert config.layer_types == ["full_attention", "sliding_attention"]


def test_a_scaling_of_positions_keeps_the_base_and_starts_from_the_length_of_old(stored):
    given = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 256}
    rope = loading.pretrained_config(stored("llama"), given).rope_parameters
    assert rope == {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64
    }  # fmt: skip
    kinds = loading.pretrained_config(
        stored("gemma3"), {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}
    ).rope_parameters
    assert kinds["full_attention"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    assert kinds["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("llama", {"hidden_size": 64}, "model.embed_tokens.weight (320, 32) → (320, 64)"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight (32, 32) would be gone"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight (320, 32) would be gone"),
        ("llama", {"num_attention_heads": 4}, "q_proj.weight (32, 32) → (64, 32)"),  # the same weights, split otherwise
        ("llama", {"vocab_size": 400}, "Leave vocab_size out; data.added_tokens and model.grow_vocabulary"),
        ("llama", {"atention_dropout": 0.1}, "did you mean attention_dropout?"),
        ("llama", {"attention_dropout": "x"}, "it must be a share"),
        ("llama", {"model_type": "qwen2"}, "choose another model.path"),
        ("llama", {"rope_parameters": {"rope_type": "yam", "factor": 2}}, "rope_type is 'yam', and there are "),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "{'factor'}"),
        ("llama", {"rope_parameters": {}, "rope_scaling": {}}, "two names of one field"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "give a mapping for each kind"),
        ("gpt2", {"n_positions": 128}, "transformer.wpe.weight (64, 32) → (128, 32)"),
        ("gpt2", {"max_position_embeddings": 128}, "did you mean n_positions?"),
    ],
)  # fmt: skip
def test_what_would_change_tensors_is_refused(stored, kind, overrides, said):
    with pytest.raises(ConfigError) as error:
        loading.pretrained_skeleton(stored(kind), dtype=torch.float32, overrides=overrides)
    assert said in str(error.value)


def test_a_longer_context_survives_the_run(continued):
    """Trained beyond the old length, planned, resumed, exported, and read by transformers as it was trained."""
    longer = ("data.sequence_length=128", "model.overrides.max_position_embeddings=256", "train.save_every=1")
    code, _, err = continued("data.sequence_length=128")
    assert (code, 'stretch its positions (docs/tasks.md, "Continue a model")' in err) == (2, True)
    code, out, err = continued(*longer, YARN, "--plan")
    assert (code, "max_position_embeddings: 64 → 256 (model.overrides)" in out) == (0, True), err
    code, out, err = continued(*longer, YARN, "train.lr=0.001")
    assert code == 0, err
    assert out.count("max_position_embeddings: 64 → 256 (model.overrides)") == 1
    assert out.count("'rope_type': 'yarn'") == 1
    code, _, err = continued(*longer, YARN.replace("4.0", "8.0"), "train.lr=0.001", "--resume", "auto")
    assert (code, "model.overrides.rope_scaling.factor: 4.0 → 8.0" in err) == (2, True)
    assert continued(*longer, YARN, "train.lr=0.001", "--resume", "auto", "train.max_steps=3")[0] == 0

    fields = json.loads(Path("runs/tiny/export/hf/config.json").read_text())
    assert fields["rope_parameters"]["original_max_position_embeddings"] == 64
    assert (fields["rope_scaling"]["rope_type"], fields["max_position_embeddings"]) == ("yarn", 256)
    exported = AutoModelForCausalLM.from_pretrained("runs/tiny/export/hf", dtype=torch.float32)
    restored, _ = assemble.restore_model(Path("runs/tiny/checkpoints/step-00000003"))
    tokens = torch.randint(0, 270, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, kept = exported(tokens).logits, restored(tokens).logits
        torch.testing.assert_close(found, kept, atol=2e-2, rtol=0)  # int8 weights are exported as bf16
        unscaled = loading.pretrained_config(Path("runs/tiny/export/hf"), {"rope_parameters": None})
        other = AutoModelForCausalLM.from_pretrained("runs/tiny/export/hf", config=unscaled, dtype=torch.float32)
        apart = (other(tokens).logits - found).abs().amax(-1)[0]
    assert float(apart[0]) < 1e-3 < float(apart[64:].max())


@pytest.mark.slow
def test_dropout_acts_in_training_alone(continued):
    states = {}
    for share in (0.0, 0.5):
        code, _, err = continued(f"run.name=d{share}", f"model.overrides.attention_dropout={share}")
        assert code == 0, err
        states[share] = final_state(f"runs/d{share}", 2)
    assert any(not torch.equal(value, states[0.5][name]) for name, value in states[0.0].items())
    model, _ = assemble.restore_model(Path("runs/d0.5/checkpoints/step-00000002"))
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_head_of_its_own_in_the_files_stays_one(stored, tmp_path):
    """Of a folder whose config ties a head that the files hold apart: an override changes nothing of that."""
    folder = tmp_path / "apart"
    loading.pretrained(str(stored("llama"))).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    said = []
    model = loading.pretrained_skeleton(
        folder, dtype=torch.float32, overrides={"attention_dropout": 0.1}, report=said.append
    )
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.attention_dropout == 0.1
