"""``qgalore.step`` trains as ordinary accumulation does, refreshes and all, and says what it cannot do."""

import pytest
import torch
import zoo

import qgalore
from qgalore.errors import ConfigError, NumericalError
from qgalore.models.loss import summed_loss, target_tokens
from qgalore.steps import api
from qgalore.steps.trial import try_walk

STEPS = 7


def make(name, **options):
    model, loss = zoo.build(name)
    rule = options.get("rule", "galore")
    qgalore.convert(model, rank=4 if rule == "galore" else None)
    settings = {"lr": 0.02, "update_proj_gap": 3, "weight_decay": 0.01, "stepping": "manual"}
    if rule == "apollo":
        settings["rank"] = 4
    return model, qgalore.optimizer(model, **(settings | options)), loss


@pytest.mark.parametrize("rule", ["galore", "apollo", "scale", "muon"])
@pytest.mark.parametrize("count", [1, 2])
def test_weights_and_moments_are_those_of_accumulation(rule, count):
    made = [make("llama", rule=rule) for _ in range(2)]
    (model, optimizer, loss), (other, accumulating, _) = made
    start = {name: value.clone() for name, value in model.state_dict().items()}
    layout = try_walk(other, zoo.batches("llama", 1)[0], loss).layout
    accumulating.accumulate_in_fp32(count > 1)
    for step in range(STEPS):
        micro_batches = [zoo.batches("llama", 2 * STEPS)[2 * step + n] for n in range(count)]
        taken = api.step(
            model, optimizer, micro_batches, loss=loss, targets=lambda _: 50 // count, seed=5, graphs_of_last=step % 3
        )
        losses = zoo.batch_major(other, list(layout.blocks), micro_batches, loss, step)
        accumulating.step()
        assert taken.loss == pytest.approx(sum(losses), rel=1e-6)
        assert taken.grad_norm == pytest.approx(accumulating.grad_norm, rel=1e-5)
    found, expected = zoo.everything(model, optimizer), zoo.everything(other, accumulating)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert optimizer.refresh_counts()[0] == accumulating.refresh_counts()[0]
    assert not any(torch.equal(start[n], value) for n, value in model.state_dict().items() if n.endswith("weight"))


def test_the_loss_is_a_mean_over_all_targets_or_over_micro_batches():
    micro_batches = zoo.batches("llama", 2)
    micro_batches[0]["labels"] = micro_batches[0]["labels"].clone()
    micro_batches[0]["labels"][:, :12] = -100
    model, optimizer, _ = make("llama")
    model.eval()  # without dropout
    sums = [float(summed_loss(model, batch).detach()) for batch in micro_batches]
    taken = api.step(model, optimizer, micro_batches, loss=summed_loss, targets=target_tokens)
    assert taken.loss == pytest.approx(sum(sums) / (8 + 32), rel=1e-5)
    model, optimizer, _ = make("llama")
    taken = api.step(model.eval(), optimizer, micro_batches, loss=summed_loss)
    assert taken.loss == pytest.approx(sum(sums) / 2, rel=1e-5)


def test_a_loss_that_is_not_finite_moves_nothing():
    model, optimizer, _ = make("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good, bad = zoo.batches("llama", 2)
    bad["factor"] = torch.tensor(float("nan"))

    def loss(model, batch):
        return summed_loss(model, {k: v for k, v in batch.items() if k != "factor"}) * batch.get("factor", 1.0)

    api.step(model, optimizer, [good], loss=loss)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = api.step(model, optimizer, [good, bad], loss=loss)
    assert taken.grad_norm is None
    assert taken.loss != taken.loss
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step_count == 2


def test_a_gradient_that_is_not_finite_names_its_tensor():
    model, optimizer, loss = make("llama")
    block = model.model.layers[1]
    block.register_full_backward_pre_hook(lambda _, gradients: tuple(g * float("inf") for g in gradients))
    with pytest.raises(NumericalError, match=r"layers\.1\."):
        api.step(model, optimizer, zoo.batches("llama", 1), loss=loss)
    assert optimizer.inside_step
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_cannot_be_walked_trains_as_usual_and_says_so_once(capsys):
    made = [make("llama") for _ in range(2)]
    for model, _, _ in made:
        norm = model.model.norm.forward
        first = model.model.layers[0]
        first.register_forward_hook(lambda module, _, output: module.__dict__.update(seen=output))
        model.model.norm.forward = lambda x, norm=norm, first=first: norm(x + first.__dict__["seen"])
        model.eval()
    (model, optimizer, loss), (other, accumulating, _) = made
    micro_batches = zoo.batches("llama", 2)
    for _ in range(3):
        taken = api.step(model, optimizer, micro_batches, loss=loss)
        for batch in micro_batches:
            (loss(other, batch) / 2).backward()
        accumulating.step()
    assert taken.blocks == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    assert "ordinary accumulation: what follows the blocks takes something" in out[0]


def test_the_random_numbers_of_the_caller_go_on():
    model, optimizer, loss = make("llama")
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    api.step(model, optimizer, zoo.batches("llama", 1), loss=loss)
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_written_in_the_loop_is_tried_once(monkeypatch):
    model, optimizer, _ = make("llama")
    tries = []
    monkeypatch.setattr(api, "try_walk", lambda *given: tries.append(1) or try_walk(*given))
    for batch in zoo.batches("llama", 3):
        api.step(model, optimizer, [batch], loss=lambda model, batch: summed_loss(model, batch) * 2)
    assert len(tries) == 1


def test_an_optimizer_of_another_kind_is_refused():
    model, optimizer, loss = make("llama", stepping="deferred")
    with pytest.raises(ConfigError, match="stepping='manual'"):
        api.step(model, optimizer, zoo.batches("llama", 1), loss=loss)
    with pytest.raises(ConfigError, match="stepping='manual'"):
        api.step(model, torch.optim.SGD(model.parameters()), zoo.batches("llama", 1), loss=loss)


def test_a_step_without_micro_batches_is_refused():
    model, optimizer, loss = make("llama")
    with pytest.raises(ConfigError, match="no micro-batches"):
        api.step(model, optimizer, [], loss=loss)
