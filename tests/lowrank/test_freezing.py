"""What a user freezes stays, bit for bit, whenever that is said: before ``optimizer``, after it, and in between."""

import copy
import pickle

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


def by_method(weight, on):
    weight.requires_grad_(on)


def by_attribute(weight, on):
    weight.requires_grad = on


@pytest.mark.parametrize("say", [by_method, by_attribute])
def test_the_weight_alone_can_be_frozen_and_freed(making, token_batches, say):
    model, make = making
    early, late = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    say(early.weight, False)
    opt = make()
    batches = token_batches(steps=8)
    before = stored(early)
    learn(model, opt, batches[:2])
    say(late.weight, False)
    since = stored(late)
    learn(model, opt, batches[2:4])
    assert moved(before, early) == []
    assert moved(since, late) == []
    say(late.weight, True)
    learn(model, opt, batches[4:])
    assert moved(before, early) == []
    assert "weight_int8" in moved(since, late)


def test_a_copy_of_a_layer_is_frozen_apart_from_it(tiny_llama):
    model = tiny_llama()
    convert(model, rank=8)
    twins = {"copy": copy.deepcopy(model), "file": pickle.loads(pickle.dumps(model))}
    own = model.model.layers[0].mlp.up_proj
    for kind, twin in twins.items():
        layer = twin.model.layers[0].mlp.up_proj
        layer.weight.requires_grad_(False)
        assert not any(leaf.requires_grad for leaf in layer.leaves().values()), kind
        assert own.delta.requires_grad, kind
