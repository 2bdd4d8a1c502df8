import builtins
import sys

import bitsandbytes as bnb
import pytest
import torch

from qgalore.errors import ConfigError
from qgalore.lowrank.inner import checked
from qgalore.lowrank.inner.adam8bit import AdamW8bitCPU

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*checked.BUILTIN, "torch.optim.SGD", "torch.optim.NAdam", torch.optim.RMSprop])
def test_accepted_optimizers(name, device):
    checked.check_ignores_value(checked.make_factory(name, 0.01, {}), device)


def test_accepted_with_options():
    checked.check_ignores_value(checked.make_factory("bitsandbytes.optim.Lion8bit", 0.01, {}), CPU)
    checked.check_ignores_value(checked.make_factory("torch.optim.Adafactor", 0.01, {"eps": [None, 1.0]}), CPU)


@pytest.mark.parametrize(
    "name", ["torch.optim.Adafactor", "bitsandbytes.optim.LAMB32bit", "bitsandbytes.optim.LAMB8bit"]
)
def test_steps_that_depend_on_the_value_are_refused(name):
    with pytest.raises(ConfigError, match="depends on the parameter's own value"):
        checked.check_ignores_value(checked.make_factory(name, 0.01, {}), CPU)


def test_a_decay_of_its_own_is_refused():
    class Decaying(torch.optim.SGD):
        def __init__(self, params, lr, **options):
            super().__init__(params, lr=lr, **{**options, "weight_decay": 0.1})

    with pytest.raises(ConfigError, match="depends on the parameter's own value"):
        checked.check_ignores_value(checked.make_factory(Decaying, 0.01, {}), CPU)
    with pytest.raises(ConfigError, match=r"train\.weight_decay"):
        checked.make_factory("adamw", 0.01, {"weight_decay": 0.1})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamq", "cannot be imported"),
        ("torch.optim.Adamw", "cannot be imported"),
        ("torch.nn.Linear", "not a torch.opt"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        checked.make_factory(name, 0.01, {})


@pytest.mark.parametrize("name", ["torch.optim.LBFGS", "torch.optim.SparseAdam"])
def test_what_cannot_take_an_ordinary_step_is_refused(name):
    with pytest.raises(ConfigError, match=r"trial step|does not take"):
        checked.check_ignores_value(checked.make_factory(name, 0.01, {}), CPU)


@pytest.mark.parametrize("name", [*checked.BUILTIN, "torch.optim.SGD", "bitsandbytes.optim.Lion8bit"])
def test_optimizers_whose_moments_rotate(name, device):
    options = {"momentum": 0.9} if name.endswith("SGD") else {}
    checked.check_rotates(checked.make_factory(name, 0.01, options), device)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch.optim.RMSprop", {}),
        ("torch.optim.Adafactor", {"eps": [None, 1.0]}),
        ("torch.optim.AdamW", {"amsgrad": True}),
        ("bitsandbytes.optim.RMSprop8bit", {}),
    ],
)
def test_optimizers_whose_moments_do_not_rotate_are_refused_at_the_start(name, options):
    with pytest.raises(ConfigError, match=r"lowrank\.moments=keep"):
        checked.check_rotates(checked.make_factory(name, 0.01, options), CPU)


def test_the_learning_rate_is_not_an_option():
    with pytest.raises(ConfigError, match=r"train\.lr"):
        checked.make_factory("adamw", 0.01, {"lr": 3})


def test_the_name_says_which_code_runs():
    [leaf] = params = [torch.nn.Parameter(torch.zeros(2))]
    assert type(checked.make_factory("adamw8bit", 0.01, {})(params)) is AdamW8bitCPU
    assert type(checked.make_factory("bitsandbytes.optim.AdamW8bit", 0.01, {})(params)) is bnb.optim.AdamW8bit
    assert "CPU code" in checked.describe("adamw8bit", leaf.device)
    assert checked.describe("adamw8bit", torch.device("cuda")) == "adamw8bit (bitsandbytes)"
    assert checked.describe("adamw", CPU) == "adamw"


def test_unknown_options():
    with pytest.raises(ConfigError, match="does not take the options"):
        checked.make_factory("adamw", 0.01, {"momentum": 0.9})


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
def test_4bit_adamw_passes_its_self_check(betas, device):
    factory = checked.make_factory("adamw4bit", 0.01, {"betas": betas, "eps": 1e-8})
    checked.check_coded("adamw4bit", factory, betas, 1e-8, device)


@pytest.mark.parametrize("name", ["adamw8bit", "bitsandbytes.optim.AdamW8bit"])
def test_8bit_adamw_passes_its_self_check(name, device):
    factory = checked.make_factory(name, 0.01, {"betas": (0.9, 0.95), "eps": 1e-8})
    checked.check_coded("adamw8bit", factory, (0.9, 0.95), 1e-8, device)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("adamw8bit", lambda params: bnb.optim.AdamW8bit(params, lr=0.01, betas=(0.5, 0.999), weight_decay=0.0)),
        ("adamw8bit", lambda params: torch.optim.SGD(params, lr=0.01)),
        ("adamw8bit", lambda params: bnb.optim.Lion8bit(params, lr=0.01)),
        ("adamw4bit", lambda params: torch.optim.SGD(params, lr=0.01)),
        ("adamw4bit", lambda params: bnb.optim.Lion8bit(params, lr=0.01)),
    ],
)
def test_self_check_refuses_what_is_not_adamw(name, wrong):
    with pytest.raises(ConfigError, match="self-check"):
        checked.check_coded(name, wrong, (0.9, 0.999), 1e-8, CPU)


def test_self_check_refuses_an_optimizer_that_does_nothing():
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    with pytest.raises(ConfigError, match="self-check"):
        checked.check_coded("adamw8bit", lambda params: Idle(params, lr=0.01), (0.9, 0.999), 1e-8, CPU)


def test_missing_bitsandbytes_names_the_remedy(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ModuleNotFoundError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("bitsandbytes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install bitsandbytes.*train\.optimizer=adamw"):
        checked.adamw8bit_class(torch.device("cuda"))
    assert checked.adamw8bit_class(CPU) is AdamW8bitCPU
