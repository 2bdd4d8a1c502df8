"""The figures of a report: which records go into which plot."""

from collections.abc import Callable
from statistics import fmean, median, quantiles

from . import plot
from .plot import Series
from .records import OF_SET, Row, Run, number, numbers
from .summary import by_kind, by_layer, kind_of, step_times, summarise_layer
from .updates import relative

BINS = 120  # points on a line: more cannot be told apart
LAYER_BINS = 40  # where each gathers the layers that happened to be refreshed: fewer, so that they are alike
MAX_CELLS = 12000  # of a heat map, so that a long run of a large model stays a file that a browser opens
STEP = "optimizer step"

Points = list[tuple[float, float]]


def _limits(run: Run) -> tuple[float, float]:
    return 1, max(2, run.step)


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


def _points(rows: list[Row], key: str, scale: float = 1.0) -> Points:
    return [(row["step"], value * scale) for row in rows if (value := number(row, key)) is not None]


def _band(label: str, points: Points, colour: int, style: str = "line") -> list[Series]:
    """The median over layers, and the band that holds the middle 80 %."""
    parts = binned(points, LAYER_BINS)
    cuts = [(a, quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9) for a, values in parts]
    band = Series(label, [(a, cut[0]) for a, cut in cuts], colour, upper=[cut[-1] for _, cut in cuts])
    return [band, Series(label, [(a, median(values)) for a, values in parts], colour, style)]


def refresh_marks(run: Run) -> list[tuple[float, float, str]]:
    """Where layers were refreshed, as long as the share of layers that were."""
    layers = len({row["layer"] for row in run.refreshes})
    steps: dict[int, int] = {}
    for row in run.refreshes:
        steps[row["step"]] = steps.get(row["step"], 0) + 1
    parts = [(a, max(values)) for a, values in binned([(step, float(count)) for step, count in steps.items()])]
    return [(a, count / layers, f"{count:.0f} of {layers} layers near step {a:.0f}") for a, count in parts]


def loss(run: Run) -> str:
    train, held = _points(run.train, "loss"), _points(run.evaluations, "eval_loss")
    series = [
        Series("train, each step", train if len(train) < 2000 else [], 0, "faint"),
        Series("train, mean", thinned(train), 0),
        Series("held out", held, 1),
        *(Series(f"held out, {name}", _points(run.evaluations, OF_SET + name), 2 + place, "dashed")
          for place, name in enumerate(run.held_out_sets)),
    ]  # fmt: skip
    title = "Loss; ticks at the top: refreshes, as long as the share of layers"
    limits = (min([1, *(step for step, _ in held)]), _limits(run)[1])  # an evaluation before the first step is at 0
    return plot.lines(title, series, STEP, "loss, nats per token", limits, marks=refresh_marks(run))


def losses_of(runs: list[Run]) -> str:
    """Held-out loss (solid) and train loss (dashed) of several runs."""
    series = []
    for colour, run in enumerate(runs):
        series.append(Series(f"{run.name}, train", thinned(_points(run.train, "loss")), colour, "dashed"))
        series.append(Series(f"{run.name}, held out", _points(run.evaluations, "eval_loss"), colour))
    return plot.lines("Loss of all runs (dashed: train)", series, STEP, "loss, nats per token")


def similarity(run: Run) -> str:
    layers = by_layer(run.refreshes)
    room = max(10, MAX_CELLS // max(1, len(layers)))
    rows = [(layer, _cells(run, found, room)) for layer, found in layers.items()]
    groups = by_kind(summarise_layer(run, layer, found) for layer, found in layers.items())
    note = (
        "Colour: the similarity found at a refresh, shown until the next one. 1: the subspace stands still; 0: chance."
    )
    sizes = [(kind, len(group)) for kind, group in groups.items()]
    return plot.heat_map("Similarity to the old basis, by layer and step", rows, sizes, STEP, _limits(run), note)


def _cells(run: Run, rows: list[Row], room: int) -> list[tuple[float, float, float, str]]:
    found = _points(rows, "similarity")
    ends = [step for step, _ in found[1:]] + [max(2, run.step)]
    size = -(-len(found) // room)
    cells = []
    for i in range(0, len(found), max(1, size)):
        value = fmean(similar for _, similar in found[i : i + size])
        start, end = found[i][0], ends[min(i + size, len(found)) - 1]
        cells.append((start, end, value, f"similarity {value:.3f}, steps {start:.0f} to {end:.0f}"))
    return cells


def _in_force(run: Run, key: str) -> list[Series]:
    """What ``key`` was at last, mean over the layers of each kind, read off at the same steps for all."""
    layers = by_layer(run.refreshes)
    steps = sorted({round(1 + i * (run.step - 1) / BINS) for i in range(BINS + 1)})
    series = []
    for colour, kind in enumerate(dict.fromkeys(map(kind_of, layers))):
        tracks = [_points(rows, key) for layer, rows in layers.items() if kind_of(layer) == kind]
        held = [(step, [value for track in tracks if (value := _value_at(track, step))]) for step in steps]
        series.append(Series(kind, [(step, fmean(values)) for step, values in held if values], colour, "steps"))
    return series


def gaps(run: Run) -> str:
    series = _in_force(run, "gap")
    highest = max((gap for one in series for _, gap in one.points), default=1.0)
    lowest = min((gap for one in series for _, gap in one.points), default=1.0)
    limits = (lowest / 2**0.25, max(highest, 2 * lowest) * 2**0.25)
    title = "Steps between refreshes, mean over layers of a kind (logarithmic)"
    return plot.lines(title, series, STEP, "gap, steps", _limits(run), limits, base=2)


def ranks(run: Run) -> str:
    series = _in_force(run, "rank")
    limits = (0, max((rank for one in series for _, rank in one.points), default=1.0) * 1.1)
    return plot.lines("Rank, mean over layers of a kind", series, STEP, "rank", _limits(run), limits)


def _value_at(track: Points, step: float) -> float | None:
    return next((value for at, value in reversed(track) if at <= step), None)


def energy(run: Run) -> str:
    after, before = _points(run.refreshes, "energy", 100), _points(run.refreshes, "energy_before", 100)
    series = [*_band("new basis", after, 0), *_band("old basis, just before", before, 1)]
    title = "Gradient energy captured at a refresh: median over layers, and the middle 80 %"
    return plot.lines(title, series, STEP, "energy, % of ‖G‖²", _limits(run))


QUANTILES = ("smallest", "25 %", "median", "75 %", "largest")


def _quantile_series(run: Run, key: str) -> list[Series]:
    held = [(row["step"], values) for row in run.refreshes if len(values := numbers(row, key) or []) == len(QUANTILES)]
    parts = [[(step, values[i]) for step, values in held] for i in range(len(QUANTILES))]
    return [Series(name, thinned(parts[i], median, LAYER_BINS), i) for i, name in enumerate(QUANTILES)]


def angles(run: Run) -> str:
    title = "Principal angles between old and new basis: quantiles within a layer, median over layers"
    series = _quantile_series(run, "angle_cosines")
    return plot.lines(title, series, STEP, "cosine (1: unchanged)", _limits(run), (0, 1))


def spectrum(run: Run) -> str:
    series = _quantile_series(run, "spectrum")[:-1]  # the largest is 1 by definition
    smallest = min((value for one in series for _, value in one.points if value > 0), default=0.1)
    limits = (max(1e-5, smallest), 1.0)
    title = "Singular values of the projected gradient: quantiles within a layer, median over layers (logarithmic)"
    return plot.lines(title, series, STEP, "σ relative to the largest", _limits(run), limits, base=10)


def int8(run: Run) -> str:
    labels = {
        "int8_changed": "weights whose integer changed",
        "int8_rescaled": "groups given a new scale",
        "int8_noise_share": "rounding noise in the change (energy)",
    }
    points = [(label, _points(run.refreshes, key, 100)) for key, label in labels.items()]
    series = [one for i, (label, found) in enumerate(points) for one in _band(label, found, i)]
    title = "int8 weights in the step of a refresh: median over layers, and the middle 80 %"
    return plot.lines(title, series, STEP, "share, %", _limits(run))


def moments(run: Run) -> str:
    series = []
    which = [(moment, what) for moment in ("first", "second") for what in ("zero", "saturated")]
    for colour, (moment, what) in enumerate(which):
        key = f"moment{1 if moment == 'first' else 2}_{what}"
        series += _band(f"{moment} moment, {what}", _points(run.refreshes, key, 100), colour)
    title = "8-bit moments before a refresh: share of zero and of saturated codes (0.39 % saturate by construction)"
    return plot.lines(title, series, STEP, "share of codes, %", _limits(run))


def throughput(run: Run) -> str:
    rates = [(step, rate) for step, rate in _points(run.train, "tokens_per_second") if rate]
    series = [
        Series("each step", rates if len(rates) < 2000 else [], 0, "faint"),
        Series("tokens per second, median", thinned(rates, median), 0),
    ]
    limits = (0, plot.padded([rate for _, rate in rates])[1]) if rates else None
    return plot.lines("Throughput; ticks at the top: refreshes", series, STEP, "tokens/s", _limits(run), limits,
                      marks=refresh_marks(run))  # fmt: skip


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
                      _limits(run), (0, top))  # fmt: skip


ALL = (loss, similarity, gaps, ranks, energy, angles, spectrum, int8, moments, throughput, refresh_share)


def _of_kinds(run: Run, value: Callable[[Row], float | None]) -> list[Series]:
    """The mean over the layers of each kind, at every step that was looked at."""
    found: dict[str, Points] = {}
    for layer, rows in by_layer(run.updates).items():
        points = [(row["step"], known) for row in rows if (known := value(row)) is not None]
        found.setdefault(kind_of(layer), []).extend(points)
    return [Series(kind, thinned(points), colour) for colour, (kind, points) in enumerate(found.items()) if points]


def update_sizes(run: Run) -> str:
    series = _of_kinds(run, lambda row: relative(row) or None)
    sizes = [size for one in series for _, size in one.points]
    limits = (min(sizes) / 2, max(sizes) * 2) if sizes else None
    title = "Size of an update: ‖ΔW‖ / ‖W‖, mean over layers of a kind (logarithmic)"
    return plot.lines(title, series, STEP, "‖ΔW‖ / ‖W‖", _limits(run), limits, base=10)


def stored_momentum(run: Run) -> str:
    series = _of_kinds(run, lambda row: number(row, "momentum_cosine"))
    lowest = min((cosine for one in series for _, cosine in one.points), default=0.0)
    title = "Cosine between the update and that of the momentum as it is stored, mean over layers of a kind"
    return plot.lines(title, series, STEP, "cosine (1: nothing is lost)", _limits(run), (min(0.0, lowest), 1.0))


OF_UPDATES = (update_sizes, stored_momentum)
