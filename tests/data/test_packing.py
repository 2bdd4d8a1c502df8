import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qgalore.data.packing import IGNORED, PackedSequences
from qgalore.data.tokens import TokenFile
from qgalore.errors import ConfigError


def token_file(*lengths: int) -> TokenFile:
    """Documents of these lengths; tokens count up, so a token tells its place."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenFile(np.arange(offsets[-1], dtype=np.uint16), offsets, int(offsets[-1]) - 1)


def test_isolated_by_hand():
    packed = PackedSequences(token_file(3, 1, 5, 4), sequence_length=4)
    assert len(packed) == 3
    batch = packed.batch([0, 1, 2])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert batch["labels"].tolist() == [[1, 2, -100, -100], [5, 6, 7, 8], [-100, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_joined_by_hand():
    packed = PackedSequences(token_file(3, 1, 5, 6), sequence_length=4, document_attention="joined")
    batch = packed.batch([2, 0])
    assert batch["input_ids"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[9, 10, 11, 12], [1, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 8))
def test_isolated_against_a_loop(lengths, length):
    tokens = token_file(*lengths)
    total = len(tokens.tokens)
    if total <= length:
        return
    packed = PackedSequences(tokens, sequence_length=length)
    assert len(packed) * length + 1 <= total < (len(packed) + 1) * length + 1
    batch = packed.batch(range(len(packed)))
    starts = set(tokens.offsets.tolist())
    position = 0
    for place in range(len(packed) * length):
        row, column = divmod(place, length)
        position = 0 if column == 0 or place in starts else position + 1
        assert batch["input_ids"][row, column] == place
        assert batch["position_ids"][row, column] == position
        assert batch["labels"][row, column] == (IGNORED if place + 1 in starts else place + 1)


def test_rows_of_one_token_documents_have_no_label():
    batch = PackedSequences(token_file(1, 1, 1, 1, 1), sequence_length=4).batch([0])
    assert batch["labels"].tolist() == [[IGNORED] * 4]
    assert batch["position_ids"].tolist() == [[0] * 4]


def test_empty_batch_keeps_its_shape():
    assert PackedSequences(token_file(9), sequence_length=4).batch([])["labels"].shape == (0, 4)


def test_batch_does_not_touch_the_data():
    tokens = token_file(4, 5)
    PackedSequences(tokens, sequence_length=4).batch([0])["input_ids"].fill_(7)
    assert tokens.tokens.tolist() == list(range(9))


def test_errors():
    with pytest.raises(ConfigError, match=r"8 tokens.*sequence_length 8 needs 9.*at most 7"):
        PackedSequences(token_file(8), sequence_length=8)
    packed = PackedSequences(token_file(9), sequence_length=4)
    for index in (2, -1):
        with pytest.raises(IndexError, match="go outside"):
            packed.batch([index])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).float().train()


# Three rows: the cuts differ between rows, and the last row has none.
ROWS = token_file(7, 9, 3, 1, 12, 17)


@pytest.mark.parametrize("indices", [[0], [0, 1, 2]])
def test_transformers_isolates_documents(llama, indices):
    batch = PackedSequences(ROWS, sequence_length=16).batch(indices)
    with torch.no_grad():
        logits = llama(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for ids, positions, packed in zip(batch["input_ids"], batch["position_ids"], logits, strict=True):
            bounds = [*torch.nonzero(positions == 0).flatten().tolist(), 16]
            for start, end in itertools.pairwise(bounds):
                alone = llama(ids[None, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[start:end], alone, rtol=1e-5, atol=1e-5)


def test_joined_documents_see_each_other(llama):
    batch = PackedSequences(ROWS, sequence_length=16, document_attention="joined").batch([0])
    with torch.no_grad():
        packed = llama(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, 7:]
        alone = llama(batch["input_ids"][:, 7:], use_cache=False).logits[0]
    assert (packed - alone).abs().max() > 1e-3


def test_isolation_carries_no_gradient_across(llama):
    batch = PackedSequences(ROWS, sequence_length=16).batch([0])
    embedded = llama.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = llama(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
    logits[0, 7:].square().sum().backward()
    assert embedded.grad[0, :7].abs().max() == 0
    assert embedded.grad[0, 7:].abs().max() > 0


def test_cache_switches_isolation_off(llama):
    """Why the docstring demands use_cache=False; when this fails, transformers no longer needs it."""
    batch = PackedSequences(ROWS, sequence_length=16).batch([0])
    with torch.no_grad():
        cached = llama(batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits
        isolated = llama(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert (cached - isolated).abs().max() > 1e-3
