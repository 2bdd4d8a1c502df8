"""Fixed-length training rows cut from a flat stream of tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from qgalore.data.documents import Documents
from qgalore.data.tokens import TokenFile
from qgalore.errors import ConfigError

IGNORED = -100  # the label that torch's cross entropy and transformers leave out


class PackedSequences:
    """Rows of ``sequence_length`` (L) tokens with their targets, documents following each other without padding.

    Sample i covers tokens i*L .. i*L + L: its first L are the inputs, its last L the targets. Conversations come laid
    out in rows of L: there sample i is row i, and only tokens of answers are targets.

    document_attention ``"isolated"``: positions restart at 0 where a document starts, and the target of a document's
    last token is ignored. transformers then keeps documents apart on its own if and only if the model is called with
    these ``position_ids``, no ``attention_mask`` and ``use_cache=False``: a cache, the default of most configurations,
    switches this off without a word. ``"joined"``: every token may see all before it in its row. with_documents:
    isolated batches also hold ``documents``, for an attention that asks for them. Raises ConfigError for data shorter
    than one window.
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        sequence_length: int,
        document_attention: Literal["isolated", "joined"] = "isolated",
        with_documents: bool = False,
    ):
        total = len(tokens.tokens)
        self._answers = tokens.answers
        if tokens.row_length not in (None, sequence_length):
            raise ConfigError(
                f"sequence_length is {sequence_length}, but the conversations are laid out in rows of "
                f"{tokens.row_length}; the two must be equal."
            )
        seen_after = 1 if tokens.row_length is None else 0  # tokens a sample needs beside its inputs
        self._n_samples = max(total - seen_after, 0) // sequence_length
        if self._n_samples == 0:
            raise ConfigError(
                f"the data has {total} tokens, and one sample of sequence_length {sequence_length} needs "
                f"{sequence_length + 1}; give more data or set a sequence_length of at most {max(total - 1, 1)}."
            )
        self.sequence_length = sequence_length
        self.document_attention = document_attention
        self.with_documents = with_documents and document_attention == "isolated"
        self._tokens = tokens.tokens
        self._offsets = np.asarray(tokens.offsets)

    def __len__(self) -> int:
        return self._n_samples

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The samples at ``indices``: ``input_ids``, ``labels``, ``position_ids``, each int64 (len(indices), L) on CPU,
        and ``documents``, where they were asked for.

        ``labels[b, t]`` is the target of ``input_ids[b, t]`` (already shifted: transformers' own ``labels`` argument
        would shift it again), or -100. In isolated mode a row of one-token documents has no other label, so a mean over
        the labels that count must allow for none. Raises IndexError.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if rows.size and not (rows.min() >= 0 and rows.max() < self._n_samples):
            raise IndexError(f"sample indices {rows.min()} .. {rows.max()} go outside 0 .. {self._n_samples - 1}")
        starts = rows[:, None] * self.sequence_length
        where = starts + np.arange(self.sequence_length + 1, dtype=np.int64)
        where = np.minimum(where, len(self._tokens) - 1)  # the last row of conversations has no token after it
        window = np.asarray(self._tokens[where]).astype(np.int64)
        labels, positions = window[:, 1:].copy(), where[:, :-1] - starts
        if self.document_attention == "isolated":
            document = np.searchsorted(self._offsets, where, side="right") - 1
            positions = where[:, :-1] - np.maximum(self._offsets[document[:, :-1]], starts)
            labels[document[:, 1:] != document[:, :-1]] = IGNORED
        if self._answers is not None:
            labels[~self._answers[where[:, 1:]]] = IGNORED
            labels[:, -1] = IGNORED  # what follows a row is another conversation
        arrays = {"input_ids": window[:, :-1].copy(), "labels": labels, "position_ids": positions}
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {**batch, "documents": Documents.of(positions)} if self.with_documents else batch
