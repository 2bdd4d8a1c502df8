"""What a user freezes stays, bit for bit, whenever that is said: before ``optimizer``, after it, and in between."""

import pytest
import torch

from qgalore import convert, optimizer
from qgalore.errors import ConfigError

RULES = {"galore": {"rank": 8}, "fira": {"rank": 8}, "scale": {"rank": None}}


def learn(model, opt, batches):
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()


def stored(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items() if "codes" not in name}


def moved(before, module):
    now = stored(module)
    return [name for name, value in before.items() if not torch.equal(value, now[name])]


def freeze(module, on=False):
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(on)


@pytest.fixture(params=[(rule, stepping) for rule in RULES for stepping in ("fused", "deferred")], ids="-".join)
def making(request, tiny_llama):
    """(a converted model, a function that makes its optimizer, which decays: what is stepped cannot stay)."""
    rule, stepping = request.param
    model = tiny_llama()
    convert(model, **RULES[rule], group_size=32)
    options = {"rule": rule, "stepping": stepping, "full_gradients": "keep", "weight_decay": 0.5}
    return model, lambda: optimizer(model, lr=0.05, update_proj_gap=2, **options)


def test_a_block_frozen_after_conversion_stays_and_the_other_moves(making, token_batches, capsys):
    model, make = making
    one, other = model.model.layers
    freeze(one)
    opt = make()
    assert (
        "note: 7 frozen layers keep their weights, for example model.layers.0.self_attn.q_proj"
        in capsys.readouterr().out
    )
    before, its = stored(one), stored(other)
    learn(model, opt, token_batches(steps=4))
    assert moved(before, one) == []
    assert {name for name in its if name.endswith("proj.weight_int8")} <= set(moved(its, other))


def test_a_layer_frozen_between_steps_stays_until_it_is_freed(making, token_batches):
    model, make = making
    layer = model.model.layers[1].mlp.up_proj
    opt = make()
    batches = token_batches(steps=6)
    learn(model, opt, batches[:2])
    freeze(layer)
    before = stored(layer)
    learn(model, opt, batches[2:4])
    assert moved(before, layer) == []
    freeze(layer, on=True)
    learn(model, opt, batches[4:])
    assert "weight_int8" in moved(before, layer)


def test_a_wholly_frozen_model_is_refused(tiny_llama):
    model = tiny_llama()
    convert(model, rank=8)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        optimizer(model, lr=0.05)
