import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from qgalore.errors import ConfigError
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.models import loading
from qgalore.models.convert import convert
from qgalore.models.loss import IGNORED, check_isolation, summed_loss, target_tokens, uncalled_layers


def test_presets_take_the_tokenizers_vocabulary():
    lines = []
    config = loading.model_config("llama_60m", tokenizer_size=32003, overrides={}, report=lines.append)
    assert config.vocab_size == 32064
    assert lines == ["model: llama_60m, vocabulary 32064 (tokenizer: 32003)"]
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (512, 1376, 8)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("llama_60m", 58), ("llama_130m", 134), ("llama_350m", 368), ("llama_1b", 1339), ("llama_7b", 6738)],
)
def test_presets_have_the_published_sizes(name, millions):
    config = loading.model_config(name, tokenizer_size=32000, overrides={}, report=lambda line: None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_any_hugging_face_config(tmp_path):
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        config = loading.model_config(str(source), tokenizer_size=99, overrides={"n_layer": 2})
        assert (config.model_type, config.n_layer, config.vocab_size) == ("gpt2", 2, 99)


def test_overrides_come_before_what_is_derived(tmp_path):
    """A preset of width 256 has heads of 64; made 128 wide it must have heads of 32."""
    quiet = {"tokenizer_size": 64, "report": lambda line: None}
    config = loading.model_config("llama_quickstart", overrides={"hidden_size": 128}, **quiet)
    assert (config.hidden_size, config.head_dim) == (128, 32)
    config.save_pretrained(tmp_path)
    again = loading.model_config(str(tmp_path), overrides={"num_attention_heads": 8, "num_key_value_heads": 8}, **quiet)
    assert again.num_attention_heads == 8
    assert (
        loading.model_config("llama_quickstart", overrides={"num_attention_heads": 8}, **quiet).num_key_value_heads == 8
    )
    with pytest.raises(ConfigError, match="model_type"):
        loading.model_config("llama_quickstart", overrides={"model_type": "gpt2"}, **quiet)


def test_bad_sources(tmp_path):
    with pytest.raises(ConfigError, match="did you mean llama_60m"):
        loading.model_config("llama60m", tokenizer_size=9, overrides={})
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="not a Hugging Face model config"):
        loading.model_config(str(tmp_path), tokenizer_size=9, overrides={})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing_known"}))
    with pytest.raises(ConfigError, match="nothing_known"):
        loading.model_config(str(tmp_path), tokenizer_size=9, overrides={})
    with pytest.raises(ConfigError, match="did you mean hidden_size"):
        loading.model_config("llama_60m", tokenizer_size=9, overrides={"hiden_size": 3}, report=lambda line: None)


def test_vocabulary_and_positions_are_checked():
    config = loading.model_config("llama_60m", tokenizer_size=64, overrides={}, report=lambda line: None)
    loading.check_vocabulary(config, highest_id=63, tokenizer_size=64)
    with pytest.raises(ConfigError, match=r"vocab_size is 64.*ids up to 64"):
        loading.check_vocabulary(config, highest_id=64, tokenizer_size=60)
    loading.check_positions(config, 2048)
    with pytest.raises(ConfigError, match=r"sequence_length is 2049.*\(2048\)"):
        loading.check_positions(config, 2049)


def test_seed_decides_the_initial_weights():
    config = loading.model_config("llama_quickstart", tokenizer_size=64, overrides={}, report=lambda line: None)
    first, again, other = (loading.from_scratch(config, dtype=torch.float32, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("overrides", [{"hidden_size": 65}, {"num_attention_heads": 0}, {"hidden_size": "wide"}])
def test_contradictory_configs_are_refused(overrides):
    with pytest.raises(ConfigError, match="no valid LlamaConfig"):
        loading.model_config("llama_quickstart", tokenizer_size=64, overrides=overrides, report=lambda line: None)


def test_pretrained_folders_and_their_damage(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = loading.pretrained(str(tmp_path), dtype=torch.float32)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in loaded.state_dict().items())

    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:8] + b"\xff" * 64 + whole[72:]):
        weights.write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot be loaded"):
            loading.pretrained(str(tmp_path), dtype=torch.float32)
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        loading.pretrained(str(tmp_path), dtype=torch.float32)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        loading.pretrained(str(tmp_path), dtype=torch.float32)


def test_missing_and_mismatched_weights_are_refused(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="missing keys"):
        loading.pretrained(str(tmp_path), dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 128}))
    with pytest.raises(ConfigError, match=r"mismatched|cannot be loaded"):
        loading.pretrained(str(tmp_path), dtype=torch.float32)


def test_summed_loss_ignores_what_is_marked(tiny_llama):
    model = tiny_llama().eval()
    tokens = torch.randint(0, 96, (2, 9))
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone(), "position_ids": torch.arange(8).repeat(2, 1)}
    logits = model(batch["input_ids"]).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view(
        2, 8
    )
    torch.testing.assert_close(summed_loss(model, batch), each.sum())
    batch["labels"][0, 3] = IGNORED
    torch.testing.assert_close(summed_loss(model, batch), each.sum() - each[0, 3])
    assert target_tokens(batch) == 15


def test_isolation_is_tried_not_assumed(tiny_llama):
    for attention in ("eager", "sdpa"):
        check_isolation(tiny_llama(attn_implementation=attention), 32)
    model = tiny_llama()
    forward = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: forward(input_ids, use_cache=use_cache)
    with pytest.raises(ConfigError, match="document_attention=joined"):
        check_isolation(model, 32)


def test_the_padding_tokens_row_trains(tiny_llama):
    model = tiny_llama(pad_token_id=5)
    assert loading.untie_padding(model) == 5
    model(torch.tensor([[5, 5, 7]]), use_cache=False).logits.square().sum().backward()
    assert float(model.get_input_embeddings().weight.grad[5].abs().max()) > 0
    assert loading.untie_padding(model) is None


def test_layers_that_are_read_but_never_called_are_found(tiny_llama):
    model = tiny_llama()
    model.spare = torch.nn.Linear(8, 8)
    convert(model, rank=4)
    assert uncalled_layers(model, LowRankLinear) == ["spare"]
    inner = model.model.layers[0].mlp
    inner.forward = lambda x: torch.nn.functional.linear(x, inner.up_proj.weight)
    with pytest.raises(ConfigError, match=r"lowrank\.exclude"):
        uncalled_layers(model, LowRankLinear)
