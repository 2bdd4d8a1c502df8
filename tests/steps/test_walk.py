"""The walk gives the gradients of ordinary accumulation, bit for bit, one block's at a time."""

import weakref

import pytest
import torch
import zoo
from walks import converted, ordinary, same, tied_names, walked

from qgalore.steps import walk as walking
from qgalore.steps.activations import Activations
from qgalore.steps.blocks import NotWalkableError
from qgalore.steps.trial import try_walk


@pytest.mark.parametrize("name", zoo.NAMES)
def test_gradients_are_those_of_accumulation(name):
    model, loss = zoo.build(name)
    micro_batches = zoo.batches(name, 2)
    losses, expected = ordinary(model, loss, micro_batches)
    seen, found = walked(model, loss, micro_batches)
    assert seen == losses
    same(name, expected, found, tied_names(name, model))


CONVERTED = [("gpt2", 2), ("gemma2", 2), ("bert classifier", 2)]


@pytest.mark.parametrize(("name", "count"), [*((n, k) for n in ("llama", "mixtral") for k in (1, 2, 8)), *CONVERTED])
def test_gradients_of_converted_models(name, count):
    model, loss = converted(name)
    micro_batches = zoo.batches(name, count)
    losses, expected = ordinary(model, loss, micro_batches)
    assert any(key.endswith("probe") for key in expected)
    assert sum(bool(value.any()) for key, value in expected.items() if key.endswith("delta")) > 3
    seen, found = walked(model, loss, micro_batches)
    assert seen == losses
    same(name, expected, found, tied_names(name, model))


def test_a_tied_low_rank_embedding_waits_for_both_of_its_parts():
    model, loss = converted("llama tied", embeddings="int8")
    micro_batches = zoo.batches("llama tied", 2)
    _, expected = ordinary(model, loss, micro_batches)
    _, found = walked(model, loss, micro_batches)
    same("llama tied", expected, found, ["model.embed_tokens.delta", "model.embed_tokens.probe"])


@pytest.mark.parametrize("options", [{"where": "host"}, {"graphs_of_last": 2}, {"where": "host", "graphs_of_last": 99}])
@pytest.mark.parametrize("name", ["mixtral", "gemma3"])
def test_where_activations_wait_changes_nothing(name, options):
    model, loss = zoo.build(name)
    micro_batches = zoo.batches(name, 3)
    losses, expected = ordinary(model, loss, micro_batches)
    kept = Activations(**options)
    for _ in range(2):  # the second time with buffers that were used before
        seen, found = walked(model, loss, micro_batches, activations=kept)
        assert seen == losses
        same(name, expected, found, tied_names(name, model))


def test_blocks_that_keep_their_graph_run_once():
    model, loss = zoo.build("llama")
    calls = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, n=number: calls.append(n))
    micro_batches = zoo.batches("llama", 2)
    trial = try_walk(model, micro_batches[0], loss)
    calls.clear()
    walked(model, loss, micro_batches, activations=Activations(graphs_of_last=2), trial=trial)
    assert calls == [0, 0, 1, 1, 2, 2, 0, 0]


def test_what_is_frozen_at_the_bottom_is_run_once_and_gets_nothing():
    model, loss = zoo.build("llama")
    model.model.embed_tokens.requires_grad_(False)
    for block in model.model.layers[:2]:
        block.requires_grad_(False)
    micro_batches = zoo.batches("llama", 2)
    losses, expected = ordinary(model, loss, micro_batches)
    calls, wanted = [], []

    def note(number, given):
        calls.append(number)
        wanted.append(given[0].requires_grad)

    for number, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, given, n=number: note(n, given))
    trial = try_walk(model, micro_batches[0], loss)
    calls.clear()
    wanted.clear()
    seen, found = walked(model, loss, micro_batches, trial=trial)
    assert seen == losses
    same("llama", expected, found)
    assert calls == [0, 0, 1, 1, 2, 2, 2, 2]
    assert not any(wanted)  # nobody asks for the gradient of the lowest block's input


def test_a_frozen_block_hands_the_gradient_down():
    model, loss = zoo.build("llama")
    model.model.layers[1].requires_grad_(False)
    micro_batches = zoo.batches("llama", 2)
    _, expected = ordinary(model, loss, micro_batches)
    _, found = walked(model, loss, micro_batches)
    same("llama", expected, found)
    assert any(".0." in key for key in found)


def test_only_the_head_trains():
    model, loss = zoo.build("llama")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    micro_batches = zoo.batches("llama", 2)
    _, expected = ordinary(model, loss, micro_batches)
    _, found = walked(model, loss, micro_batches)
    same("llama", expected, found)
    assert list(found) == ["lm_head.weight"]


def test_gradients_of_one_part_exist_at_a_time():
    model, loss = zoo.build("llama")
    micro_batches = zoo.batches("llama", 8)
    parameters = list(model.parameters())
    parts = [*model.model.layers, model.lm_head, model.model.embed_tokens]
    largest = max(sum(p.nbytes for p in part.parameters()) for part in parts) + model.model.norm.weight.nbytes
    live, given = [], []

    def look(_):
        live.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(look)

    def step(_, parameters):
        assert not any(gradient() is not None for gradient in given)
        for parameter in parameters:
            if parameter.grad is not None:
                given.append(weakref.ref(parameter.grad))
                parameter.grad = None

    walked(model, loss, micro_batches, step=step)
    assert len(live) == 8 * len(parameters)
    assert max(live) <= largest < sum(p.nbytes for p in parameters) / 2


def test_the_order_of_parts():
    model, loss = zoo.build("llama")
    order = []

    def step(part, parameters):
        order.append(part)
        for parameter in parameters:
            parameter.grad = None

    walked(model, loss, zoo.batches("llama", 2), step=step)
    assert order == ["epilogue", "block 2", "block 1", "block 0", "prologue"]


def test_a_step_may_keep_gradients_until_the_end():
    model, loss = zoo.build("llama tied")
    micro_batches = zoo.batches("llama tied", 2)
    _, expected = ordinary(model, loss, micro_batches)
    last = {}
    walked(model, loss, micro_batches, step=lambda part, parameters: last.update({part: parameters}))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in last["prologue"]} == set(expected)


def test_the_losses_are_known_before_a_weight_moves():
    model, loss = zoo.build("llama")
    micro_batches = zoo.batches("llama", 2)
    losses, _ = ordinary(model, loss, micro_batches)
    given, kept = [], Activations(where="host")

    def refuse(values):
        given.extend(values.tolist())
        return False

    def never(*_):
        raise AssertionError("a refused step was taken")

    seen, _ = walked(model, loss, micro_batches, decide=refuse, step=never, activations=kept)
    assert given == seen == losses
    assert all(p.grad is None for p in model.parameters())


def test_a_walk_that_is_broken_off_leaves_no_gradient():
    model, loss = zoo.build("llama")
    micro_batches = zoo.batches("llama", 2)
    kept = Activations()

    def fail(part, _):
        if part == "block 1":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        walked(model, loss, micro_batches, step=fail, activations=kept)
    assert all(p.grad is None for p in model.parameters())
    losses, _ = ordinary(model, loss, micro_batches)
    assert walked(model, loss, micro_batches, activations=kept)[0] == losses


def test_a_micro_batch_that_takes_another_way_is_an_error():
    model, loss = zoo.build("opt")
    micro_batches = zoo.batches("opt", 2)
    trial = try_walk(model, micro_batches[0], loss)
    model.model.decoder.layerdrop = 1.0
    with pytest.raises(NotWalkableError, match="only 0 of 3 blocks"):
        walked(model, loss, micro_batches, trial=trial)


def test_dropout_differs_by_step_micro_batch_and_part():
    draws = set()
    for place in [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]:
        walking.reseed(*place)
        draws.add(float(torch.rand(())))
    assert len(draws) == 5


def test_the_blocks_run_under_the_models_autocast():
    model, _ = zoo.build("llama")

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())

    micro_batches = zoo.batches("llama", 2)
    losses, expected = ordinary(model, loss, micro_batches)
    seen, found = walked(model, loss, micro_batches)
    assert seen == losses
    same("llama", expected, found)


def test_checkpointing_of_transformers_is_left_out_and_put_back():
    model, loss = zoo.build("llama")
    micro_batches = zoo.batches("llama", 2)
    losses, expected = ordinary(model, loss, micro_batches)
    model.gradient_checkpointing_enable()
    calls = []
    trial = try_walk(model, micro_batches[0], loss)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    seen, found = walked(model, loss, micro_batches, trial=trial)
    assert seen == losses
    same("llama", expected, found)
    assert len(calls) == 4  # once in each direction for each micro-batch
    assert model.model.layers[0].gradient_checkpointing
