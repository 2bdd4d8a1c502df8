"""The line plots of a page: which records go into which of them."""

from collections.abc import Callable
from statistics import fmean, median, quantiles

from . import plot
from .plot import Series
from .records import Row, Run, held_out, number, numbers
from .summary import by_layer, kind_of, step_times
from .updates import momentum_error, relative

BINS = 120  # points on a line: more cannot be told apart
LAYER_BINS = 40  # where each gathers the layers that happened to be refreshed: fewer, so that they are alike
STEP = "step"  # figures whose x axis bears one label show one cursor

Points = list[tuple[float, float]]


def steps_of(run: Run) -> tuple[float, float]:
    """The steps of a plot; from 0 where the model was evaluated before its first step."""
    first = 0 if any(row["step"] == 0 for row in run.evaluations) else 1
    return first, max(2, run.step)


def binned(points: Points, bins: int = BINS) -> list[tuple[float, list[float]]]:
    """(mean x, all y) of up to ``bins`` + 1 equal parts of the range of x, in order."""
    if not points:
        return []
    low, high = min(a for a, _ in points), max(a for a, _ in points)
    width = (high - low) / bins or 1.0
    parts: dict[int, Points] = {}
    for a, b in points:
        parts.setdefault(int((a - low) / width), []).append((a, b))
    return [(fmean(a for a, _ in part), [b for _, b in part]) for _, part in sorted(parts.items())]


def thinned(points: Points, gather: Callable[[list[float]], float] = fmean, bins: int = BINS) -> Points:
    return [(a, gather(values)) for a, values in binned(points, bins)]


def points_of(rows: list[Row], key: str, scale: float = 1.0) -> Points:
    return [(row["step"], value * scale) for row in rows if (value := number(row, key)) is not None]


def _band(label: str, points: Points, colour: int) -> list[Series]:
    """The median over layers, and the band that holds the middle 80 %."""
    parts = binned(points, LAYER_BINS)
    cuts = [(a, quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9) for a, values in parts]
    band = Series(label, [(a, cut[0]) for a, cut in cuts], colour, upper=[cut[-1] for _, cut in cuts])
    return [band, Series(label, [(a, median(values)) for a, values in parts], colour)]


def refresh_marks(run: Run) -> list[tuple[float, float, str]]:
    """Where layers were refreshed, as long as the share of layers that were."""
    layers = len({row["layer"] for row in run.refreshes})
    steps: dict[int, int] = {}
    for row in run.refreshes:
        steps[row["step"]] = steps.get(row["step"], 0) + 1
    parts = [(a, max(values)) for a, values in binned([(step, float(count)) for step, count in steps.items()])]
    return [(a, count / layers, f"{count:.0f} of {layers} layers near step {a:.0f}") for a, count in parts]


def _held_out_series(run: Run, label: str, colour: int) -> list[Series]:
    sets = held_out(run).items()
    return [
        Series(f"{label}, {name}" if name else label, list(points), colour + i) for i, (name, points) in enumerate(sets)
    ]


def loss(run: Run) -> str:
    train = points_of(run.train, "loss")
    series = [
        Series("train, each step", train if len(train) < 2000 else [], 0, "faint"),
        Series("train, mean", thinned(train), 0),
        *_held_out_series(run, "held out", 1),
    ]
    title = "Loss. Ticks at the top mark steps with refreshes, and a longer tick means more layers"
    return plot.lines(title, series, STEP, "loss, nats per token", steps_of(run), marks=refresh_marks(run))


def loss_picture(train: Points, held_out: Points) -> str:
    """The losses of a run as a picture by itself (SVG), for a model card."""
    series = [Series("training loss", thinned(train), 0, "faint"), Series("held-out loss", held_out, 1)]
    return plot.picture([one for one in series if one.points], "optimizer step", "loss")


def _steps_of_all(runs: list[Run]) -> tuple[float, float]:
    found = [steps_of(run) for run in runs]
    return min(first for first, _ in found), max(last for _, last in found)


def losses_of(runs: list[Run]) -> str:
    series = [one for colour, run in enumerate(runs) for one in _held_out_series(run, run.name, colour)]
    several = [Series(one.label, one.points, colour) for colour, one in enumerate(series)]
    return plot.lines("Held-out loss of all runs", several, STEP, "loss, nats per token", _steps_of_all(runs))


def train_losses_of(runs: list[Run]) -> str:
    series = [Series(run.name, thinned(points_of(run.train, "loss")), colour) for colour, run in enumerate(runs)]
    title = "Train loss of all runs, means of a few steps"
    return plot.lines(title, series, STEP, "loss, nats per token", _steps_of_all(runs))


def _in_force(run: Run, key: str) -> list[Series]:
    """What ``key`` was at last, mean over the layers of each kind, read off at the same steps for all."""
    layers = by_layer(run.refreshes)
    steps = sorted({round(1 + i * (run.step - 1) / BINS) for i in range(BINS + 1)})
    series = []
    for colour, kind in enumerate(dict.fromkeys(map(kind_of, layers))):
        tracks = [points_of(rows, key) for layer, rows in layers.items() if kind_of(layer) == kind]
        held = [(step, [value for track in tracks if (value := _value_at(track, step))]) for step in steps]
        series.append(Series(kind, [(step, fmean(values)) for step, values in held if values], colour, "steps"))
    return series


def gaps(run: Run) -> str:
    series = _in_force(run, "gap")
    highest = max((gap for one in series for _, gap in one.points), default=1.0)
    lowest = min((gap for one in series for _, gap in one.points), default=1.0)
    limits = (lowest / 2**0.25, max(highest, 2 * lowest) * 2**0.25)
    title = "Steps between refreshes, mean over layers of a kind (logarithmic)"
    return plot.lines(title, series, STEP, "gap, steps", steps_of(run), limits, base=2)


def ranks(run: Run) -> str:
    series = _in_force(run, "rank")
    limits = (0, max((rank for one in series for _, rank in one.points), default=1.0) * 1.1)
    return plot.lines("Rank, mean over layers of a kind", series, STEP, "rank", steps_of(run), limits)


def _value_at(track: Points, step: float) -> float | None:
    return next((value for at, value in reversed(track) if at <= step), None)


def _bands(run: Run, title: str, y_label: str, labels: dict[str, str]) -> str:
    """Shares over the layers refreshed in a step, in percent; ``labels`` by the keys of the records."""
    series = [
        one
        for colour, (key, label) in enumerate(labels.items())
        for one in _band(label, points_of(run.refreshes, key, 100), colour)
    ]
    return plot.lines(f"{title}, median over layers and the middle 80 %", series, STEP, y_label, steps_of(run))


def energy(run: Run) -> str:
    labels = {"energy": "new basis", "energy_before": "old basis, just before"}
    return _bands(run, "Gradient energy captured at a refresh", "energy, % of ‖G‖²", labels)


QUANTILES = ("smallest", "25 %", "median", "75 %", "largest")


def _quantile_series(run: Run, key: str) -> list[Series]:
    held = [(row["step"], values) for row in run.refreshes if len(values := numbers(row, key) or []) == len(QUANTILES)]
    parts = [[(step, values[i]) for step, values in held] for i in range(len(QUANTILES))]
    return [Series(name, thinned(parts[i], median, LAYER_BINS), i) for i, name in enumerate(QUANTILES)]


def angles(run: Run) -> str:
    title = "Principal angles between old and new basis: quantiles within a layer, median over layers"
    series = _quantile_series(run, "angle_cosines")
    return plot.lines(title, series, STEP, "cosine (1: unchanged)", steps_of(run), (0, 1))


def spectrum(run: Run) -> str:
    series = _quantile_series(run, "spectrum")[:-1]  # the largest is 1 by definition
    smallest = min((value for one in series for _, value in one.points if value > 0), default=0.1)
    limits = (max(1e-5, smallest), 1.0)
    title = "Singular values of the projected gradient: quantiles within a layer, median over layers (logarithmic)"
    return plot.lines(title, series, STEP, "σ relative to the largest", steps_of(run), limits, base=10)


def int8(run: Run) -> str:
    labels = {
        "int8_changed": "weights whose integer changed",
        "int8_rescaled": "groups given a new scale",
        "int8_noise_share": "rounding noise in the change (energy)",
    }
    return _bands(run, "int8 weights in the step of a refresh", "share, %", labels)


def moments(run: Run) -> str:
    numbered = {"1": "first moment", "2": "second moment"}
    labels = {f"moment{n}_{what}": f"{name}, {what}" for n, name in numbered.items() for what in ("zero", "saturated")}
    title = "Zero and saturated codes of 8-bit moments before a refresh (0.39 % saturate by construction)"
    return _bands(run, title, "share of codes, %", labels)


def throughput(run: Run) -> str:
    rates = [(step, rate) for step, rate in points_of(run.train, "tokens_per_second") if rate]
    series = [
        Series("each step", rates if len(rates) < 2000 else [], 0, "faint"),
        Series("tokens per second, median", thinned(rates, median), 0),
    ]
    limits = (0, plot.padded([rate for _, rate in rates])[1]) if rates else None
    title = "Throughput. Ticks at the top mark steps with refreshes"
    return plot.lines(title, series, STEP, "tokens/s", steps_of(run), limits, marks=refresh_marks(run))


def refresh_share(run: Run) -> str:
    """Refresh time over step time, up to each step: what the refreshes cost, amortised."""
    spent: dict[int, float] = {}
    for row in run.refreshes:
        spent[row["step"]] = spent.get(row["step"], 0.0) + (number(row, "seconds") or 0.0)
    if not spent:
        return ""
    share, refreshing, stepping = [], 0.0, 0.0
    for step, seconds in step_times(run):
        refreshing, stepping = refreshing + spent.get(step, 0.0), stepping + seconds
        share.append((step, 100 * refreshing / stepping))
    series = [Series("refreshes so far", thinned(share), 2)]
    top = plot.padded([value for _, value in share])[1] if share else 1.0
    return plot.lines("Share of step time spent in refreshes, up to each step", series, STEP, "% of step time",
                      steps_of(run), (0, top))  # fmt: skip


def _of_kinds(run: Run, value: Callable[[Row], float | None]) -> list[Series]:
    """The mean over the layers of each kind, at every step that was looked at."""
    found: dict[str, Points] = {}
    for layer, rows in by_layer(run.updates).items():
        points = [(row["step"], known) for row in rows if (known := value(row)) is not None]
        found.setdefault(kind_of(layer), []).extend(points)
    return [Series(kind, thinned(points), colour) for colour, (kind, points) in enumerate(found.items()) if points]


def _logarithmic(run: Run, title: str, label: str, series: list[Series]) -> str:
    values = [value for one in series for _, value in one.points]
    limits = (min(values) / 2, max(values) * 2) if values else None
    return plot.lines(title, series, STEP, label, steps_of(run), limits, base=10)


def update_sizes(run: Run) -> str:
    series = _of_kinds(run, lambda row: relative(row) or None)
    return _logarithmic(run, "Size of an update, mean over layers of a kind (logarithmic)", "‖ΔW‖ / ‖W‖", series)


def stored_momentum(run: Run) -> str:
    title = "Error of the stored momentum, mean over layers of a kind (logarithmic)"
    return _logarithmic(run, title, "1 − cosine (0: nothing is lost)", _of_kinds(run, momentum_error))
