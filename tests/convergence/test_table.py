import json

import pytest

from qgalore.convergence import records, summary, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0, "0.00s"), (9.994, "9.99s"), (9.996, "10.0s"), (59.94, "59.9s"), (59.96, "0m59s"), (61, "1m01s"),
     (600, "10m"), (3599, "60m"), (3660, "1h01m"), (36000, "10h"), (4e6, "1111h")],
)  # fmt: skip
def test_durations_are_short(seconds, text):
    assert table.duration(seconds) == text
    assert len(text) <= 5


@pytest.mark.parametrize(
    ("loss", "text"),
    [(None, "-"), (5.46844, "5.4684"), (9.99996, "10.000"), (10.77171, "10.772"), (99.9996, "100.0"),
     (231.3747, "231.4"), (9999.96, "1e+04"), (1e30, "1e+30")],
)  # fmt: skip
def test_losses_leave_a_blank_before_them(loss, text):
    assert table.nats(loss) == text
    assert len(text) < dict(table.RUN_COLUMNS)["loss"]


def test_tables_fit_and_show_every_layer(recorded):
    found = summary.summarise(records.read_run(recorded[0]))
    text = table.run_table(found, table.layer_lines(found))
    assert max(map(len, [*text.splitlines(), *table.LEGEND.splitlines()])) <= table.WIDTH
    lines = text.splitlines()
    for layer in found.layers:
        head = next(i for i, line in enumerate(lines) if line.startswith(f"{layer.kind} (2)"))
        own = next(
            line for line in lines[head + 1 :] if line.split()[0] == f"layers.{layer.name.split('.')[2]}"
        ).split()
        assert own[1] == f"{layer.shape[0]}×{layer.shape[1]}"
        assert own[2:6] == [str(layer.rank), str(layer.done), str(layer.skipped), str(layer.gap)]
        assert [float(value) for value in own[6:9]] == pytest.approx(
            [layer.similarity, layer.energy, layer.energy_before], abs=5.001e-4
        )
    assert lines[-1].split()[:4] == ["total", "(14)", "-", "40"]
    assert len(table.layer_lines(found, kinds=True)) == 7


def test_huge_and_unknown_values_still_fit():
    huge = summary.LayerSummary(
        "model.layers.100.block_sparse_moe.experts.119.gate_up_projection", "gate_up_projection_of_an_expert", 1,
        (262144, 16384), 16384, 99999, 9999999, 3, 160000, -0.123, 1.0, 0.5, 1, 1, 4e7, 4e6,
    )  # fmt: skip
    unknown = summary.LayerSummary("b", "b", 1, None, None, 0, None, 0, None, None, None, None, None, 0, 0.0, None)
    run = records.Run(None, "a-name-longer-than-the-column-has-room", {}, [{"step": 10**7, "lr": 1}], [], [], 0)
    one = summary.RunSummary(run, 2.0, None, 1e6, 0.01, [huge, unknown], summary.together("total", [huge, unknown]))
    for text in (table.run_table(one, table.layer_lines(one)), table.runs_table([one, one])):
        assert max(map(len, text.splitlines())) <= table.WIDTH
    assert table.layer_lines(one)[1].split() == ["b", "-", "-", "0", *["-"] * 6, "0.00s", "-"]


def test_a_run_without_a_subspace_says_so(recorded):
    folder, _ = recorded
    (folder / "subspace.jsonl").unlink()
    (folder / "config.yaml").write_text(json.dumps({"method": "adamw"}))
    found = summary.summarise(records.read_run(folder))
    text = table.run_table(found, table.layer_lines(found))
    assert "no refresh is recorded (method adamw)" in text
    assert table.runs_table([found]).splitlines()[-1].split()[-4:] == ["-"] * 4
