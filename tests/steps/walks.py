"""A step by the walk and one by ordinary accumulation, and whether both gave the same."""

from functools import partial

import torch
import zoo

from qgalore.lowrank.layers.linear import Basis, LowRankLinear
from qgalore.models.convert import convert
from qgalore.steps import walk as walking
from qgalore.steps.activations import Activations
from qgalore.steps.trial import try_walk

STEP = 4


def walked(model, loss, micro_batches, *, activations=None, decide=lambda losses: True, step=None, trial=None):
    """Losses and, by name, the gradients that each part's call was given."""
    trial = trial or try_walk(model, micro_batches[0], loss)
    assert trial.layout is not None, trial.why
    names, found = {id(p): name for name, p in model.named_parameters()}, {}

    def take(part, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                assert names[id(parameter)] not in found, "a tensor was stepped before its gradient was complete"
                found[names[id(parameter)]] = parameter.grad
                parameter.grad = None

    losses = walking.walk(
        trial.layout,
        [partial(lambda batch: loss(model, batch) / 50, batch) for batch in micro_batches],
        reseed=partial(walking.reseed, 5, STEP),
        decide=decide,
        step=step or take,
        activations=activations or Activations(),
    )
    return losses.tolist(), found


def ordinary(model, loss, micro_batches):
    layout = try_walk(model, micro_batches[0], loss).layout
    losses = zoo.batch_major(model, list(layout.blocks), micro_batches, loss, STEP)
    found = zoo.gradients(model)
    model.zero_grad()
    return losses, found


def same(name, expected, found, tied=()):
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        if key in tied:
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))
        else:
            assert torch.equal(found[key], gradient), f"{key} of {name} differs"


def tied_names(name, model):
    head = model.get_output_embeddings() if name in zoo.TIED else None
    return [key for key, p in model.named_parameters() if head is not None and p is head.weight]


def converted(name, **options):
    """A model with bases that are not zero, in which every second layer asks for its whole gradient."""
    model, loss = zoo.build(name)
    convert(model, rank=4, **options)
    for number, module in enumerate(m for m in model.modules() if isinstance(m, Basis | LowRankLinear)):
        if isinstance(module, Basis):
            module.assign(torch.linalg.qr(torch.randn(module.dim, module.rank))[0])
        elif number % 4 == 0:
            module.probe.requires_grad_(True)
            module.delta.requires_grad_(False)
    return model, loss
