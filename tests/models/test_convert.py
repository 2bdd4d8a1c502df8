import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen2Config

import qgalore
from qgalore.errors import ConfigError
from qgalore.lowrank.layers.embedding import LowRankEmbedding, TiedHead
from qgalore.lowrank.layers.linear import LowRankLinear
from qgalore.models.convert import convert

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "qwen2": (Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=1, tie_word_embeddings=True), 14),
    "gpt_neox": (GPTNeoXConfig(**SMALL, intermediate_size=48), 8),
    "opt": (OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32), 12),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32), 8),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_are_matched_by_type_in_any_architecture(name):
    """Outputs after conversion stay within int8's error of the original's, and training moves every tensor."""
    config, expected = OTHERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.randint(0, 64, (2, 12))
    before = model(tokens).logits.detach()
    report = convert(model, rank=4)
    assert len(report.converted) == expected
    after = model(tokens).logits.detach()
    # a weight's error is at most 1.1 · absmax / 254, about 0.4 % · 3 of a Gaussian weight; a few layers add up
    assert float((after - before).norm() / before.norm()) < 0.05
    assert not torch.equal(after, before)
    opt = qgalore.optimizer(model, lr=1e-2)
    weights = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.int8 or n in report.dense}
    model.train()
    model(tokens, use_cache=False).logits.square().mean().backward()
    opt.step()
    assert opt.untouched == []
    same = [n for n, p in model.named_parameters() if n in weights and torch.equal(p, weights[n])]
    # a key's bias shifts all scores of a query alike, so softmax gives it no gradient beyond rounding
    assert [n for n in same if "k_proj.bias" not in n] == []


def test_report_names_everything(tiny_llama):
    model = tiny_llama()
    report = convert(model, rank=8)
    text = str(report)
    assert len(report.converted) == 14
    assert "lm_head (the output head, trained in full)" in text
    assert "group_size 128 does not divide in_features 64; 64 is used (12 layers)" in text
    assert "group_size 128 does not divide in_features 96; 32 is used (2 layers)" in text
    assert report.converted_elements == sum(m.weight.numel() for m in model.modules() if isinstance(m, LowRankLinear))
    assert set(report.dense) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
    }
    covered = report.converted_elements + sum(report.dense.values())
    assert covered == sum(p.numel() for p in tiny_llama().parameters())


def test_rank_above_the_matrix_is_clamped_and_said(tiny_llama):
    report = convert(tiny_llama(), rank=1000)
    ranks = {layer.shape: layer.rank for layer in report.converted}
    assert all(rank == min(shape) for shape, rank in ranks.items())
    assert "rank 1000 is above the matrix's smaller side; clamped to 64" in str(report)


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True])
def test_bad_ranks(tiny_llama, rank):
    with pytest.raises(ConfigError, match="rank is"):
        convert(tiny_llama(), rank=rank)


@pytest.mark.parametrize(
    "bad", [{"proj_type": "up"}, {"group_size": 100}, {"basis_format": "int3"}, {"weight_format": "int4"}]
)
def test_bad_names(tiny_llama, bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} is"):
        convert(tiny_llama(), rank=4, **bad)


def test_include_and_exclude(tiny_llama):
    model = tiny_llama()
    report = convert(model, rank=4, include=["*.mlp.*", "lm_head"], exclude=["*.1.mlp.up_proj"])
    names = {layer.name for layer in report.converted}
    assert "lm_head" in names
    assert "model.layers.0.mlp.up_proj" in names
    assert len(names) == 6
    assert report.skipped["model.layers.1.mlp.up_proj"] == "in exclude"
    assert report.skipped["model.layers.0.self_attn.q_proj"] == "not in include"
    with pytest.raises(ConfigError, match="matches no linear layer"):
        convert(tiny_llama(), rank=4, exclude=["*.fc1"])
    with pytest.raises(ConfigError, match="no layer of LlamaForCausalLM was converted"):
        convert(tiny_llama(), rank=4, exclude=["*"])


def test_a_tied_head_is_left_with_its_embedding(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    convert(model, rank=4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shared_frozen_and_special_layers_are_named():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("plain", "first", "second", "frozen")})
    model["special"] = Special(8, 8)
    model["second"].weight = model["first"].weight
    model["frozen"].requires_grad_(False)
    report = convert(model, rank=2)
    assert [layer.name for layer in report.converted] == ["plain"]
    assert "shared" in report.skipped["first"]
    assert "frozen" in report.skipped["frozen"]
    assert "Special" in report.skipped["special"]


def test_weights_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[3, 2] = float("inf")
    with pytest.raises(ConfigError, match=r"0 cannot be converted.*inf or nan"):
        convert(model, rank=2)


def test_models_without_linear_layers_are_refused():
    with pytest.raises(ConfigError, match="no linear layer"):
        convert(nn.Embedding(4, 4), rank=2)


@pytest.mark.parametrize("width", [2736, 5461])
def test_published_widths_fall_back_to_rows(width):
    model = nn.Sequential(nn.Linear(width, 16, bias=False))
    report = convert(model, rank=4)
    assert report.converted[0].group_size == width
    assert f"group_size 128 does not divide in_features {width}; {width} is used" in str(report)
    assert model[0].weight_scale.shape == (16, 1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_and_head_become_int8_when_asked(tiny_llama, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    report = convert(model, rank=8, embeddings="int8", weight_format="none")
    lines = {layer.name: layer for layer in report.converted}
    assert isinstance(model.model.embed_tokens, LowRankEmbedding)
    assert model.model.embed_tokens.weight.dtype == torch.int8  # whatever weight_format is
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert lines["model.embed_tokens"].shape == (96, 64)
    assert lines["model.embed_tokens"].group_size == 64
    assert not report.skipped
    assert not any("embed" in name or "head" in name for name in report.dense)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, LowRankLinear))
    assert report.converted_elements == weights
    if tied:
        assert isinstance(model.lm_head, TiedHead)
        assert "lm_head" not in lines
        assert "lm_head is the same tensor, trained by both gradients" in str(report)
    else:
        assert type(model.lm_head) is LowRankLinear
        assert lines["lm_head"].shape == (96, 64)


def test_exclude_keeps_an_untied_head_and_refuses_a_tied_one(tiny_llama):
    model = tiny_llama()
    report = convert(model, rank=8, embeddings="int8", exclude=["lm_head"])
    assert type(model.lm_head) is nn.Linear
    assert "lm_head" in report.skipped
    assert "lm_head.weight" in report.dense
    with pytest.raises(ConfigError, match="lm_head, which is tied to"):
        convert(tiny_llama(tie_word_embeddings=True), rank=8, embeddings="int8", exclude=["lm_head"])


def test_a_frozen_embedding_stays(tiny_llama):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    report = convert(model, rank=8, embeddings="int8")
    assert type(model.model.embed_tokens) is nn.Embedding
    assert report.skipped["model.embed_tokens"] == "its weight is frozen"
    assert type(model.lm_head) is LowRankLinear
    tied = tiny_llama(tie_word_embeddings=True)
    tied.model.embed_tokens.requires_grad_(False)
    convert(tied, rank=8, embeddings="int8")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert type(tied.lm_head) is nn.Linear


def test_a_padding_row_is_handled_or_refused(tiny_llama):
    model = tiny_llama(pad_token_id=3)
    convert(model, rank=8, embeddings="int8")
    assert model.model.embed_tokens.padding_idx == 3
    with pytest.raises(ConfigError, match=r"model.embed_tokens cannot be converted: padding_idx 3"):
        convert(tiny_llama(pad_token_id=3), rank=8, embeddings="int8", proj_type="left")


def test_embeddings_that_do_something_else_are_refused(tiny_llama):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    def scaled(model):
        model.model.embed_tokens = Scaled(96, 64)

    def clipped(model):
        model.model.embed_tokens.max_norm = 1.0

    def borrowed(model):
        model.extra = nn.Embedding(96, 64)
        model.extra.weight = model.model.embed_tokens.weight

    def custom_head(model):
        model.lm_head = type("OwnHead", (nn.Linear,), {})(64, 96)

    for change, words in ((scaled, "a Scaled"), (clipped, "max_norm"), (borrowed, "shared"), (custom_head, "OwnHead")):
        model = tiny_llama()
        change(model)
        with pytest.raises(ConfigError, match=words) as caught:
            convert(model, rank=8, embeddings="int8")
        assert "embeddings=full" in str(caught.value)
    with pytest.raises(ConfigError, match="embeddings is 'int4'"):
        convert(tiny_llama(), rank=8, embeddings="int4")
