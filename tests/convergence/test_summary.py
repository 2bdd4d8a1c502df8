import json
import re
from dataclasses import replace
from statistics import median

import pytest

from qgalore.convergence import records, summary
from qgalore.lowrank.subspace.schedule import LazySchedule, staggered_first_gaps


def test_counts_and_share_are_those_the_run_printed(recorded):
    folder, output = recorded
    found = summary.summarise(records.read_run(folder))
    done, skipped, share = re.findall(r"refreshes (\d+) \(skipped (\d+)\), ([\d.]+)% of the time", output)[-1]
    assert int(skipped) > 0
    assert (found.total.done, found.total.skipped) == (int(done), int(skipped))
    assert 100 * found.share == pytest.approx(float(share), abs=0.05001)


def test_fixed_refreshes_are_those_of_a_schedule_that_never_stretches(recorded):
    """Simulated step by step, against the closed formula over what the records say."""
    found = summary.summarise(records.read_run(recorded[0]))
    gaps = iter(staggered_first_gaps(14, 2))
    wanted = []
    for first_gap in gaps:
        schedule = LazySchedule(base_gap=2, first_gap=first_gap)
        for step in range(14):
            if schedule.due(step):
                schedule.record(step, None)
        wanted.append(schedule.refreshes)
    assert sorted(layer.fixed for layer in found.layers) == sorted(wanted)


def test_a_layer_shows_its_last_refresh(recorded):
    folder, _ = recorded
    rows = [json.loads(line) for line in (folder / "subspace.jsonl").read_text().splitlines()]
    found = {layer.name: layer for layer in summary.summarise(records.read_run(folder)).layers}
    assert len(found) == 14
    settled = set()
    for name, layer in found.items():
        own = [row for row in rows if row["layer"] == name]
        for key in ("similarity", "energy", "energy_before", "gap", "rank"):
            assert getattr(layer, key) == own[-1][key]
        assert list(layer.shape) == own[-1]["shape"]
        assert layer.seconds == pytest.approx(sum(row["seconds"] for row in own))
        price = sum(row["seconds"] for row in own[1:]) / (len(own) - 1)
        assert layer.saved_seconds == pytest.approx(price * layer.skipped)
        assert layer.at_limit == (own[-1]["gap"] >= 4)
        assert layer.settled == (layer.at_limit or own[-1]["similarity"] >= 0.3)
        settled.add(layer.settled)
    assert 1 in settled


def test_kinds_gather_their_layers(recorded):
    found = summary.summarise(records.read_run(recorded[0]))
    kinds = summary.by_kind(found.layers)
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [kind.split(".")[-1] for kind in kinds] == order
    for kind, layers in kinds.items():
        assert [layer.name.split(".")[2] for layer in layers] == ["0", "1"]
        both = summary.together(kind, layers)
        assert both.done == sum(layer.done for layer in layers)
        assert both.gap == median(layer.gap for layer in layers)
        assert both.energy == pytest.approx((layers[0].energy + layers[1].energy) / 2)


def test_unknown_values_do_not_count_as_zero(recorded):
    layers = summary.summarise(records.read_run(recorded[0])).layers[:3]
    gaps = [
        replace(layer, gap=gap, energy=energy)
        for layer, gap, energy in zip(layers, (2, 4, 100), (0.5, None, 0.7), strict=True)
    ]
    both = summary.together("x", gaps)
    assert both.gap == 4
    assert both.energy == pytest.approx(0.6)
    assert summary.together("x", [replace(layer, energy=None) for layer in layers]).energy is None


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc", "mlp.c_fc"),
        ("model.layers.0.experts.7.w1", "w1"),
        ("model.layers.3.mlp.experts.down_proj.7", "mlp.experts.down_proj"),
        ("0", "0"),
        ("model.embed_tokens", "embed_tokens"),
    ],
)
def test_kinds_of_names(layer, kind):
    assert summary.kind_of(layer) == kind


def test_older_rows_and_a_run_without_refreshes(recorded):
    folder, _ = recorded
    new = {"version", "rank", "shape", "angle_cosines", "spectrum"}
    rows = [json.loads(line) for line in (folder / "subspace.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in row.items() if k not in new and not k.startswith(("moment", "int8"))} for row in rows]
    before = summary.summarise(records.read_run(folder))
    (folder / "subspace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    train = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stripped = [{k: v for k, v in row.items() if k not in ("step_seconds", "refresh_seconds")} for row in train]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stripped))
    found = summary.summarise(records.read_run(folder))
    assert found.total.rank is None
    assert found.layers[0].shape is None
    assert (found.total.done, found.total.skipped) == (before.total.done, before.total.skipped)
    assert found.share == pytest.approx(before.share)  # from tokens and their rate

    (folder / "subspace.jsonl").write_text("")
    none = summary.summarise(records.read_run(folder))
    assert none.total is None
    assert none.share is None
    assert none.loss == before.loss


def test_failures_and_postponed_layers():
    """A zero gradient postpones the first basis; a failed decomposition keeps the old one. Neither is a refresh."""
    base = {"layer": "a.0.b", "seconds": 1.0, "gap": 10, "similarity": None}
    rows = [
        {**base, "step": 1, "first": True, "failed": "the gradient is zero", "next_refresh": 1, "seconds": 0.0},
        {**base, "step": 2, "first": True, "failed": None, "next_refresh": 5, "energy": 0.9},
        {**base, "step": 6, "first": False, "failed": None, "next_refresh": 15, "energy": 0.8, "similarity": 0.5},
        {**base, "step": 16, "first": False, "failed": "did not converge", "next_refresh": 25},
    ]
    train = [{"step": step, "lr": 1.0} for step in range(1, 31)]
    run = records.Run(None, "x", {"lowrank": {"cos_threshold": 0.4}}, train, [], rows, 0)
    layer = summary.summarise_layer(run, "a.0.b", rows)
    assert (layer.done, layer.failed, layer.energy, layer.settled) == (2, 2, 0.8, 1)
    assert layer.fixed == LazySchedule(base_gap=10, first_gap=4).fixed_refreshes(30) == 2 + 25 // 10
