"""A causal call for each document gives what a mask gives, in every way through a step; and who cannot have it."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from qgalore.data.documents import Documents
from qgalore.models import attention
from qgalore.models.loss import summed_loss
from qgalore.models.recompute import checkpoint_blocks
from qgalore.steps import walk as walking
from qgalore.steps.activations import Activations
from qgalore.steps.trial import try_walk

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": None}
PLAIN = {**SIZE, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
SEPARATED = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=20),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "gemma3": lambda: Gemma3TextConfig(**HEADS, sliding_window=20),
    "phi": lambda: PhiConfig(**PLAIN),
    "gpt_neox": lambda: GPTNeoXConfig(**PLAIN),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
MASKED = {
    "a window": (lambda: MistralConfig(**GROUPED, sliding_window=19), "layers see 19 tokens back, fewer than the 20"),
    "a window in some": (lambda: Gemma3TextConfig(**HEADS, sliding_window=8), "layers see 8 tokens back"),
    "capped scores": (lambda: Gemma2Config(**HEADS), "Gemma2ForCausalLM attends by eager"),
    "its own code": (lambda: FalconConfig(**SIZE), "FalconForCausalLM has an attention of its own"),
    "other layers": (lambda: Qwen3NextConfig(**HEADS), "layers of kind linear_attention"),
}
LENGTHS = [(7, 1, 12), (20,), (3, 17)]


def built(config, dtype=torch.float64):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def on_paper(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def packed(lengths=LENGTHS, seed=0):
    """A micro-batch of rows with documents of these lengths, as the data have it."""
    positions = np.array([[place for length in row for place in range(length)] for row in lengths])
    ids = torch.randint(0, 64, positions.shape, generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "position_ids": torch.from_numpy(positions), "labels": ids.roll(-1, 1)}
    return {**batch, "documents": Documents.of(positions)}


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        summed_loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_documents_are_where_positions_start_again():
    documents = packed()["documents"]
    assert documents.lengths == tuple(LENGTHS)
    assert documents.shape == (3, 1, 20, 20)
    assert not documents.whole
    assert packed([(20,), (20,)])["documents"].whole
    assert documents.to("cuda") is documents


@pytest.mark.parametrize("name", SEPARATED)
def test_losses_and_gradients_are_those_of_a_mask(name):
    """In fp64: a thousand roundings of 1e-16 stay below 1e-12 of the largest value, and a token that sees one too many
    or too few changes far more."""
    shape = SEPARATED[name]()
    assert attention.use_by_document(on_paper(shape), 20) is None
    model, batch = built(shape).eval(), packed()
    losses, found = [], []
    for way in ("sdpa", attention.BY_DOCUMENT):
        assert attention.use(model, way) is None
        losses.append(float(summed_loss(model, batch).detach()))
        found.append(gradients(model, [batch]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-13)
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=0, atol=1e-12 * largest)


def test_in_fp32_the_two_ways_differ_by_rounding_alone():
    """A gradient is a sum of some hundred products, each rounded to 2⁻²⁴, in two layers: 1e-5 of the largest."""
    model, batch = built(SEPARATED["llama"](), torch.float32), packed()
    masked = gradients(model, [batch])
    attention.use(model, attention.BY_DOCUMENT)
    separate = gradients(model, [batch])
    largest = max(float(gradient.abs().max()) for gradient in masked.values())
    for name, gradient in masked.items():
        torch.testing.assert_close(separate[name], gradient, rtol=0, atol=1e-5 * largest)


class Slices(TorchDispatchMode):
    """Counts the gradients of slices, each of which is as large as what was sliced."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("slice_backward", "select_backward")
        return func(*args, **(kwargs or {}))


def test_many_short_documents_take_few_calls_and_their_gradients_one_tensor(monkeypatch):
    """Otherwise a row of many documents takes longer than with a mask."""
    forward, calls = attention.sdpa_attention_forward, []

    def counted(module, query, *rest, **options):
        calls.append(tuple(query.shape[::2]))
        return forward(module, query, *rest, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    documents, layer = Documents([[2] * 8, [2, 2, 10, 2]]), nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 1
    inputs = [torch.randn(2, 3, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with Slices() as slices:
        together, _ = attention.by_document(layer, *inputs, documents)
        together.square().sum().backward()
    assert calls == [(11, 2), (1, 10)]
    assert slices.count == 0
    alone = [forward(layer, *(x[row : row + 1, :, a:b] for x in inputs), None)[0] for row, a, b in PLACES]
    found = [together[row : row + 1, a:b] for row, a, b in PLACES]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)  # sums of ten products at most, in fp64


PLACES = [(0, a, a + 2) for a in range(0, 16, 2)] + [(1, 0, 2), (1, 2, 4), (1, 4, 14), (1, 14, 16)]


def test_rows_of_one_document_have_the_bits_they_always_had():
    model, batch = built(SEPARATED["llama"](), torch.float32), packed([(20,), (20,)])
    before = gradients(model, [batch])
    attention.use(model, attention.BY_DOCUMENT)
    after = gradients(model, [batch])
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_no_token_asks_a_device_for_documents():
    """The model is called with documents alone: no mask is made, and no call sees more than its document."""
    model, seen = built(SEPARATED["llama"]()), []
    attention.use(model, attention.BY_DOCUMENT)
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, attn_mask=None, **options):
        seen.append((attn_mask, len(query), query.shape[-2], key.shape[-2], options["is_causal"]))
        return real(query, key, value, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = noted
    try:
        summed_loss(model, packed())
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
    each = [(None, 1, length, length, length > 1) for row in LENGTHS for length in row]
    assert seen == each * 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("graphs", [0, 2])
def test_a_walk_knows_the_documents_of_each_micro_batch(graphs, dropout):
    """Layer-major, with blocks that run again: each micro-batch has other documents."""
    model = built(LlamaConfig(**GROUPED, attention_dropout=dropout)).train()
    attention.use(model, attention.BY_DOCUMENT)
    batches = [packed(seed=1), packed([(2, 18), (9, 11), (10, 10)], seed=2)]
    trial = try_walk(model, batches[0], summed_loss)
    assert trial.layout is not None, trial.why
    names, found = {id(p): name for name, p in model.named_parameters()}, {}

    def take(_, parameters):
        for parameter in (p for p in parameters if p.grad is not None):
            found[names[id(parameter)]] = parameter.grad
            parameter.grad = None

    walking.walk(
        trial.layout,
        [partial(summed_loss, model, batch) for batch in batches],
        reseed=partial(walking.reseed, 5, 0) if dropout else lambda *_: None,
        decide=lambda losses: True,
        step=take,
        activations=Activations(graphs_of_last=graphs),
    )
    if dropout:  # what is dropped follows from step, micro-batch and block, whether the graph was kept or not
        assert found.keys() == names_of(model)
        _REMEMBERED.setdefault("dropped", found)
        assert all(torch.equal(found[name], gradient) for name, gradient in _REMEMBERED["dropped"].items())
    else:
        expected = gradients(model, batches)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


_REMEMBERED: dict[str, dict] = {}


def names_of(model):
    return {name for name, _ in model.named_parameters()}


def test_checkpointed_blocks_see_the_same_documents_again():
    model, batches = built(SEPARATED["llama"]()).train(), [packed()]
    attention.use(model, attention.BY_DOCUMENT)
    expected = gradients(model, batches)
    checkpoint_blocks(model, "device", 0)
    found = gradients(model, batches)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("name", MASKED)
def test_what_documents_do_not_say_stays_with_the_models_own_mask(name):
    make, reason = MASKED[name]
    model = on_paper(make())
    before = attention.implementation(model)
    assert reason in attention.use_by_document(model, 20)
    assert attention.implementation(model) == before


def test_a_layer_that_is_not_told_of_documents_is_noticed():
    model = on_paper(SEPARATED["llama"]())
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, *, attention_mask, **options: forward(hidden, attention_mask=None, **options)
    assert "not all of its layers" in attention.use_by_document(model, 20)
    assert attention.implementation(model) == "sdpa"


def test_the_description_of_a_model_does_not_name_it():
    model = on_paper(MixtralConfig(**GROUPED, num_local_experts=4))
    attention.use(model, attention.BY_DOCUMENT)
    assert attention.implementation(model) == attention.BY_DOCUMENT
    assert attention.BY_DOCUMENT not in model.config.to_json_string(use_diff=False)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_keeps_documents_apart_as_eager_does():
    """Forward alone: on a CPU it has no backward pass. Blocks have 128 tokens, and documents end within them."""
    lengths = [(100, 156), (256,)]
    shape = {**GROUPED, "hidden_size": 64, "max_position_embeddings": 256}
    model, batch = built(LlamaConfig(**shape), torch.float32).eval(), packed(lengths)
    del batch["documents"]
    logits = []
    for way in ("eager", attention.FLEX):
        assert attention.use(model, way) is None
        logits.append(model(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5 * float(logits[0].abs().max()))
