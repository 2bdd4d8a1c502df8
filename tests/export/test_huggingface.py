import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import qgalore
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError
from qgalore.files import export_gguf, export_hf, export_int8
from qgalore.files.export_tensors import dense_tensors
from qgalore.files.safetensors import Deferred


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a little text to learn from"] * 10, vocab_size=300, report=lambda line: None)


def trained(model, tokens, embeddings):
    qgalore.convert(model, rank=4, embeddings=embeddings)
    opt = qgalore.optimizer(model, lr=1e-2)
    for _ in range(3):
        model(tokens, use_cache=False).logits.logsumexp(-1).mean().backward()
        opt.step()
    return model.eval()


def cases(tiny_llama):
    yield tiny_llama(vocab_size=320)
    yield tiny_llama(vocab_size=320, tie_word_embeddings=True)
    torch.manual_seed(0)
    yield GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def dense_state(model, dtype=torch.bfloat16):
    """What an export holds, by name."""
    entries = dense_tensors(model, dtype)
    return {name: one.make().cpu() if isinstance(one, Deferred) else one for name, one in entries.items()}


@pytest.mark.parametrize("index", [0, 1, 2], ids=["untied", "tied", "conv1d"])
@pytest.mark.parametrize("embeddings", ["full", "int8"])
def test_the_export_reloads_to_the_same_values(tiny_llama, tokenizer, tmp_path, index, embeddings):
    """Invariant 7 for bf16: every tensor is the stored value rounded once; logits agree in bf16's precision."""
    tokens = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    model = trained(list(cases(tiny_llama))[index], tokens, embeddings)
    export_hf.save(model, tokenizer, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    state = loaded.state_dict()
    wanted = dense_state(model)
    missing = set(state) - set(wanted)
    assert missing <= {"lm_head.weight"}  # tied: stored once
    for name, value in wanted.items():
        assert torch.equal(value, state[name]), name
    exact = dense_state(model, torch.float32)
    assert all(torch.equal(wanted[n], exact[n].to(torch.bfloat16)) for n in wanted)
    ours = model(tokens).logits
    theirs = loaded.float()(tokens).logits
    # every weight carries a relative error of up to 2⁻⁹, a few layers deep
    assert float((ours - theirs).norm() / ours.norm()) < 8 * 2.0**-9
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a little text")["input_ids"] == tokenizer("a little text")["input_ids"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_reload_to_equal_logits_and_other_formats_refuse_them(kind, tokenizer, tmp_path):
    """Written in fp32, which holds every int8 value, so that no token changes its expert by a rounding; the products
    are the same, but for their order. transformers writes the layout of the hub, a tensor for each expert."""
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}
    few |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **few), dtype=torch.float32)
    tokens = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    model = trained(model, tokens, "full")
    export_hf.save(model, tokenizer, tmp_path, torch.float32)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"mixture of experts.*--format hf"):
        export_int8.save(model, tokenizer, tmp_path / "int8")
    with pytest.raises(ConfigError, match=rf"not {kind}.*--format hf"):
        export_gguf.save(model, tokenizer, tmp_path / "gguf")
