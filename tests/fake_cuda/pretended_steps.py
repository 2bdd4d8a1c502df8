"""A run's steps on a device that is not there: built, taken, evaluated and saved by the product's own code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import yaml
from pretended import pretended
from pretended_device import DEVICE, Account, Device

from qgalore import config as configuration
from qgalore.data.labelled import Labels
from qgalore.data.packing import PackedSequences
from qgalore.evaluation.loss import evaluate
from qgalore.files import checkpoint
from qgalore.files.safetensors import _bytes
from qgalore.models import classify
from qgalore.models.loss import target_tokens
from qgalore.training import loop_settings as settings
from qgalore.training.model import Vocabulary, build_model, build_optimizer
from qgalore.training.streamed import Placing
from qgalore.training.trial import order_of, try_layer_major

LENGTH, ROWS, WORDS = 64, 2, 512
BASE = {
    "method": "qgalore",
    "model": {
        "config": "llama_quickstart",
        "overrides": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "elementwise": "plain",  # whether Liger is installed or not
    },
    "data": {"vocab_size": WORDS, "sequence_length": LENGTH},
    "train": {"max_steps": 4, "micro_batch_size": ROWS, "lr": 0.01, "full_gradients": "keep"},
    "lowrank": {"rank": 32, "update_proj_gap": 2},
}


@dataclass
class Stream:
    """Tokens of documents that are shorter than a row."""

    tokens: Any = field(default_factory=lambda: np.arange(64 * LENGTH + 1, dtype=np.uint16) % WORDS)
    offsets: Any = field(default_factory=lambda: np.arange(0, 64 * LENGTH + 2, 40))
    answers: None = None
    row_length: None = None


@dataclass
class Labelled:
    """Rows with a label each, of so many ``classes`` or, with one, numbers."""

    classes: int

    def __len__(self) -> int:
        return 64

    def batch(self, indices: Any) -> dict[str, torch.Tensor]:
        rows = len(indices)
        ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
        labels = torch.zeros(rows, dtype=torch.float32 if self.classes == 1 else torch.int64)
        return {"input_ids": ids, "attention_mask": ids + 1, "labels": labels}


def samples_of(config: configuration.Config) -> Any:
    """What a run of ``config`` trains on: packed rows of several documents, or labelled rows."""
    if config.data.task == "classify":
        return Labelled(1 if config.data.label_type == "number" else 2)
    how: dict[str, Any] = {"document_attention": config.data.document_attention}
    if "with_documents" in signature(PackedSequences).parameters:
        how["with_documents"] = True
    return PackedSequences(Stream(), sequence_length=LENGTH, **how)


@dataclass
class Taken:
    """``steps``: an account of each step; then of an evaluation and of what a checkpoint asks for."""

    device: Device
    steps: list[Account]
    evaluation: Account
    saving: Account
    refreshes: int


def config_of(folder: Any, *overrides: str, bf16: bool = True) -> configuration.Config:
    (folder / "fake.yaml").write_text(yaml.safe_dump(BASE | {"data": BASE["data"] | {"train": str(folder)}}))
    return configuration.resolve(configuration.load(str(folder / "fake.yaml"), list(overrides)), "cuda", bf16, 1)


@contextmanager
def _accounted(device: Device) -> Iterator[Account]:
    before, device.account = device.account, Account()
    try:
        yield device.account
    finally:
        device.account = before


def take(config: configuration.Config, *, steps: int = 2, resumed: bool = False, **of_device: Any) -> Taken:
    """Build the run of ``config`` and take ``steps``; the first finds all bases. ``resumed``: load the optimizer's
    state afterwards, and take one more. ``of_device``: see :func:`pretended`."""
    labelled = config.data.task == "classify"
    names = None if config.data.label_type == "number" else ("no", "yes")
    vocabulary = Vocabulary(WORDS, 1, 2, Labels(names) if labelled else None, 0 if labelled else None)
    samples, place = samples_of(config), Placing(config)
    with pretended(**of_device) as device:
        entered: list[Any] = []

        def placed(model: torch.nn.Module, where: torch.device) -> None:
            # The model's shapes are made on the meta device, which no tensor here may be on.
            for mode in (device.mode, device):
                mode.__enter__()
                entered.append(mode)
            place(model, where)

        try:
            return _take(config, vocabulary, samples, place, placed, device, steps, resumed)
        finally:
            for mode in reversed(entered):
                mode.__exit__(None, None, None)


def _take(
    config: configuration.Config,
    vocabulary: Vocabulary,
    samples: Any,
    place: Placing,
    placed: Callable[[torch.nn.Module, torch.device], None],
    device: Device,
    steps: int,
    resumed: bool,
) -> Taken:
    model, loss = build_model(config, vocabulary, WORDS - 1, DEVICE, place=placed)
    config, layout = try_layer_major(config, model, loss, samples, DEVICE)
    optimizer = build_optimizer(config, model, config.train.stepping if layout is None else "manual")
    place.adopt(model, optimizer, layout)
    order = order_of(config, model, optimizer, layout, settings.of_steps(config), place.stream)
    many, size = config.train.grad_accumulation, config.train.micro_batch_size

    def share(batch: dict[str, torch.Tensor]) -> torch.Tensor:  # as training.loop has it
        batch = {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}
        return loss(model, batch) / (many * size)

    def step(number: int) -> None:
        batches = [samples.batch(range(size)) for _ in range(many)]
        order.take(number, range(many), batches, share, lambda value: None)

    accounts, refreshes = [], 0
    model.train()
    for number in range(steps):
        with _accounted(device) as account:
            step(number)
        accounts.append(account)
        refreshes += len(optimizer.events)
        optimizer.events.clear()
        optimizer.observations.clear()
    with _accounted(device) as evaluation:
        makes = [partial(samples.batch, range(size))] * 2
        if vocabulary.labels is not None:
            classify.evaluate(model, makes, ["accuracy"] if vocabulary.labels.names else ["pearson"], DEVICE)
        else:
            evaluate(model, makes, loss, target_tokens, DEVICE)
    with _accounted(device) as saving:
        state = optimizer.state_dict()
        for held in checkpoint._contents(model, state)[0].values():
            for name, value in held.items():
                _bytes(name, value).cpu().numpy()
    if resumed:
        optimizer.load_state_dict(on_host(state))
        place.collect()
        step(steps)
    return Taken(device, accounts, evaluation, saving, refreshes)


def on_host(state: Any) -> Any:
    """A state as a checkpoint gives it back."""
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    return torch.zeros_like(state, device="cpu") if torch.is_tensor(state) else state
