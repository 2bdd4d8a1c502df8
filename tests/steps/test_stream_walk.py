"""A walk over streamed blocks takes the steps of one whose blocks stay on the device, bit for bit."""

import random
from functools import partial

import pytest
import torch
import transformers as tf
import zoo

import qgalore
from qgalore.errors import ConfigError
from qgalore.models.loss import summed_loss
from qgalore.steps import api
from qgalore.steps.activations import Activations, OnDevice
from qgalore.steps.streaming.copies import ThreadCopies
from qgalore.steps.streaming.evaluating import losses
from qgalore.steps.streaming.stream import Stream
from qgalore.steps.trial import try_walk

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}
STEPS, MANY, GAP, RANK = 7, 30, 3, 32  # rank: large enough for 8-bit moments


def make(blocks=3, rule="galore", dtype=torch.bfloat16, inner="adamw8bit", compute="bf16", **options):
    torch.manual_seed(3)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, num_hidden_layers=blocks)).to(dtype).train()
    group = 128 if compute == "bf16" else "row"
    rank = RANK if rule in ("galore", "fira") else None
    qgalore.convert(model, rank=rank, compute=compute, group_size=group)
    given = {"lr": 0.01, "update_proj_gap": GAP, "weight_decay": 0.01, "stepping": "manual", "rule": rule, **options}
    if rule == "apollo":
        given["rank"] = RANK
    return model, lambda: qgalore.optimizer(model, inner=inner, **given)


def batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 96, (2, 16), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(model, optimizer, count, turns=None, steps=STEPS):
    losses = []
    for step in range(steps):
        micro_batches = [batch(step * count + n) for n in range(count)]
        taken = api.step(model, optimizer, micro_batches, loss=summed_loss, seed=5, turns=turns)
        losses.append((taken.loss, taken.grad_norm))
    return losses


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    found = dict(model.state_dict())
    for name, state in optimizer.state_dict()["slots"].items():
        for kind in ("inner", "extra"):
            values = {f"{name}|{kind}|{key}": value for key, value in state[kind].items()}
            found |= {key: torch.as_tensor(value) for key, value in values.items()}
    return found


def streamed(slots, state, seed=1, **options):
    model, optimizer = make(**options)
    dice = random.Random(seed)
    copies = ThreadCopies(lambda: dice.choice((0.0, 0.0, 0.0, 1e-3)))
    stream = Stream(model, list(model.model.layers), CPU, slots=slots, copies=copies)
    optimizer = optimizer()
    stream.adopt(optimizer, state=state)
    return model, optimizer, stream


def products(model) -> dict[str, tuple[bool, bool]]:
    """The layers that multiply integers, and in which of their two products they do."""
    layers = {name: getattr(module, "products", None) for name, module in model.named_modules()}
    return {name: choices.taken for name, choices in layers.items() if choices is not None}


FEW = [("galore", 2, 2, True, {}), ("muon", 1, 3, True, {})]
REST = [
    ("galore", 1, 2, True, {}),
    ("galore", 4, 3, True, {}),
    ("galore", 2, 2, True, {"compute": "int8"}),
    ("galore", 4, 2, False, {"moments": "reset"}),
    ("galore", 1, 2, True, {"inner": "adamw4bit", "dtype": torch.float32}),
    ("galore", 1, 3, True, {"inner": "adamw"}),
    ("fira", 4, 2, True, {}),
    ("fira", 1, 3, False, {}),
    ("apollo", 1, 2, True, {}),
    ("muon", 4, 2, True, {}),
    ("muon", 1, 3, True, {"momentum": "8bit"}),
    ("sinkgd", 1, 2, False, {}),
]
CASES = [(STEPS, *case) for case in FEW] + [pytest.param(MANY, *case, marks=pytest.mark.slow) for case in REST]


@pytest.mark.parametrize(("steps", "rule", "count", "slots", "state", "options"), CASES)
def test_streamed_steps_are_those_of_resident_blocks(steps, rule, count, slots, state, options):
    resident, build = make(rule=rule, **options)
    optimizer = build()
    expected = train(resident, optimizer, count, steps=steps)
    model, other, stream = streamed(slots, state, rule=rule, **options)
    assert train(model, other, count, stream, steps) == expected
    assert products(model) == products(resident)
    assert other.refresh_counts() == optimizer.refresh_counts()
    wanted, found = everything(resident, optimizer), everything(model, other)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


KINDS = [
    ("galore", {}),
    ("galore", {"inner": "adamw"}),
    ("galore", {"inner": "adamw4bit", "dtype": torch.float32}),
    ("galore", {"compute": "int8"}),
    ("fira", {}),
    ("apollo", {}),
    ("muon", {}),
    ("muon", {"momentum": "8bit"}),
    ("sinkgd", {}),
    ("scale", {}),
]
SCHEDULES = 10  # of each kind, beside the 240 of the engine alone


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "options"), KINDS)
def test_the_delays_of_copies_do_not_show(rule, options):
    wanted = {}
    for count in (1, 4):
        model, build = make(rule=rule, **options)
        optimizer = build()
        wanted[count] = train(model, optimizer, count, steps=GAP + 1), everything(model, optimizer)
    for seed in range(SCHEDULES):
        dice = random.Random(seed)
        count, slots, state = dice.choice((1, 4)), dice.choice((2, 3)), dice.choice((True, False))
        model, optimizer, stream = streamed(slots, state, seed, rule=rule, **options)
        taken = train(model, optimizer, count, stream, GAP + 1)
        assert taken == wanted[count][0], f"seed {seed}"
        found = everything(model, optimizer)
        assert all(torch.equal(found[name], value) for name, value in wanted[count][1].items()), f"seed {seed}"


def bases_of(record) -> int:
    return record.size(("bases",))


@pytest.mark.parametrize(("slots", "state"), [(2, True), pytest.param(3, False, marks=pytest.mark.slow)])
def test_the_bytes_of_a_step_are_the_computed_ones(slots, state):
    """In: all weights, then every record but what the last slots hold of it. Out: all but the bases, and those of
    blocks with a refresh."""
    blocks = 5
    model, optimizer, stream = streamed(slots, state, blocks=blocks, stagger=False, cos_threshold=1.5)
    records, kept = stream.records, range(blocks - slots, blocks)
    weights = sum(record.size(("weights",)) for record in records)
    into = weights + sum(r.nbytes - (r.size(("weights",)) if n in kept else 0) for n, r in enumerate(records))
    train(model, optimizer, 1, stream, steps=1)  # and the trial before it
    for step in range(1, GAP + 2):
        before = dict(stream.copied)
        train(model, optimizer, 1, stream, steps=1)
        refreshed = step % GAP == 0
        assert stream.copied["in"] - before["in"] == into
        out = sum(record.nbytes - (0 if refreshed else bases_of(record)) for record in records)
        assert stream.copied["out"] - before["out"] == out, f"step {step}"


def test_device_memory_does_not_grow_with_the_blocks():
    sizes = set()
    for blocks in (3, 6):
        _, _, stream = streamed(2, True, blocks=blocks)
        stream.begin()
        sizes.add(sum(slot.memory.nbytes for slot in stream._slots.all))
        stream.end(whole=True)
        assert stream.host_bytes == blocks * stream.records[0].nbytes
    assert len(sizes) == 1


def test_a_record_holds_all_of_a_block():
    """Every byte of a block's weights, bases, masters and moments, but single values and what all tensors share."""
    model, optimizer, stream = streamed(2, True)
    train(model, optimizer, 1, stream, steps=1)
    record, block = stream.records[0], model.model.layers[0]
    inside = {name.split("|")[0] for name in everything(model, optimizer) if "layers.0." in name}
    assert inside
    low, high = record.memory.data_ptr(), record.memory.data_ptr() + record.nbytes
    leaves = {id(leaf) for tensor in optimizer.tensors_of(block) for leaf in tensor.leaves() if tensor.module}
    own = [t for t in (*block.parameters(), *block.buffers()) if id(t) not in leaves]
    for tensor in optimizer.tensors_of(block):
        own += [v for k, v in tensor.state()["inner"].items() if torch.is_tensor(v) and v.ndim and "qmap" not in k]
        own += [value for value in tensor.tensors().values() if value.ndim]
    assert len(own) > 40
    assert all(low <= tensor.data_ptr() < high for tensor in own)


def test_a_loss_that_is_not_finite_moves_nothing():
    model, optimizer, stream = streamed(2, True)
    factor = [1.0]

    def take(number: int):
        return api.step(
            model, optimizer, [batch(number)], loss=lambda m, b: summed_loss(m, b) * factor[0], turns=stream
        )

    take(1)
    before = {name: value.clone() for name, value in everything(model, optimizer).items()}
    factor[0] = float("inf")
    assert take(2).grad_norm is None
    assert all(torch.equal(value, before[name]) for name, value in everything(model, optimizer).items())
    factor[0] = 1.0
    assert take(3).grad_norm is not None


def test_loaded_states_are_taken_up():
    """A checkpoint that is loaded between two steps replaces moments and overwrites weights in the records."""
    model, optimizer, stream = streamed(2, True)
    train(model, optimizer, 1, stream, steps=2)
    saved = {name: value.clone() for name, value in model.state_dict().items()}, cloned(optimizer.state_dict())
    expected = train(model, optimizer, 1, stream, steps=3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(cloned(saved[1]))
    assert train(model, optimizer, 1, stream, steps=3) == expected


def cloned(value):
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {key: cloned(inner) for key, inner in value.items()}
    return [cloned(inner) for inner in value] if isinstance(value, list) else value


def test_kept_graphs_are_refused():
    model, optimizer, stream = streamed(2, True)
    with pytest.raises(ConfigError, match="graphs_of_last is 1"):
        api.step(model, optimizer, [batch(0)], loss=summed_loss, graphs_of_last=1, turns=stream)


@torch.no_grad()
def test_evaluation_and_generation_fetch_the_blocks():
    resident, _ = make()
    model, _, stream = streamed(2, True)
    assert torch.equal(summed_loss(model.eval(), batch(1)), summed_loss(resident.eval(), batch(1)))
    assert stream.copied == {"in": sum(record.size(("weights",)) for record in stream.records), "out": 0}
    prompt = torch.tensor([[5, 6, 7]])
    wanted = resident.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), wanted)


class Counting(OnDevice):
    """Notes the most bytes that it ever held."""

    most = 0

    def put(self, block, number, tensor):
        super().put(block, number, tensor)
        self.most = max(self.most, sum(value.nbytes for value in self._kept.values()))


def held_out(model, count: int) -> list:
    return [partial(summed_loss, model, batch(number)) for number in range(count)]


def looked_at(where: str, count: int, change=lambda runs: None):
    """Losses of streamed blocks, how often each was fetched for them, and what was kept; and those of resident ones."""
    resident, _ = make()
    model, _, stream = streamed(2, True)
    layout = try_walk(model, batch(0), summed_loss).layout
    kept, wanted, runs = Activations(where=where), held_out(resident.eval(), count), held_out(model.eval(), count)
    if where == "device":
        kept.inputs = Counting()
    change(wanted)
    change(runs)
    before = stream.copied["in"]
    found = list(losses(layout, iter(runs), kept, stream, micro_batches=2))
    fetches = (stream.copied["in"] - before) / sum(record.size(("weights",)) for record in stream.records)
    assert stream.copied["out"] == 0
    with torch.no_grad():
        assert torch.equal(torch.stack(found), torch.stack([run() for run in wanted]))
    return fetches, kept


@pytest.mark.parametrize("where", ["device", "host"])
def test_held_out_batches_share_the_fetches_of_a_block(where):
    """Two micro-batches of a step keep six hidden states behind three blocks, and arguments. Five have that room here:
    so seven come in two groups, and a block is fetched twice."""
    fetches, kept = looked_at(where, 7)
    assert fetches == 2
    hidden = 2 * 16 * SHAPE["hidden_size"] * 2
    if where == "device":
        assert kept.inputs.most == 5 * hidden


def test_a_batch_that_goes_another_way_is_taken_alone_and_a_line_says_so(capsys):
    """Here one that calls no blocks at all."""
    fetches, _ = looked_at("device", 7, lambda runs: runs.insert(6, lambda: torch.ones(())))
    assert fetches == 1 + 2, "a group of five, then one by one"
    assert "taken one by one through streamed blocks: only 0 of 3 blocks are called" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "opt", "llama tied", "llama of one block", "bert classifier"])
def test_other_architectures(name):
    """Experts without tokens, Conv1D's, biases, positions of their own, and a prologue that trains."""
    found = []
    for streams in (False, True):
        model, loss = zoo.build(name)
        qgalore.convert(model, rank=4)
        optimizer = qgalore.optimizer(model, lr=0.02, update_proj_gap=3, stepping="manual")
        stream = None
        if streams:
            layout = try_walk(model, zoo.batches(name, 1)[0], loss).layout
            stream = Stream(model, list(layout.blocks), CPU, copies=ThreadCopies(lambda: 1e-4))
            stream.adopt(optimizer, state=True)
        for micro_batches in zip(*[iter(zoo.batches(name, 8))] * 2, strict=True):
            api.step(model, optimizer, micro_batches, loss=loss, seed=5, turns=stream)
        found.append(everything(model, optimizer))
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key
