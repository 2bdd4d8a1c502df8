"""The loss of a run over its steps as a picture (SVG), for a model card."""

from statistics import fmean

Points = list[tuple[int, float]]  # (step, loss)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 56, 40, 36, 16  # pixels: of the picture, and of its margins
MOST = 200  # points of a line: more cannot be told apart
TRAIN, HELD_OUT = "#8fb3d9", "#c2410c"


def loss_picture(train: Points, held_out: Points) -> str:
    """The picture of at least one point. The line of training steps is the mean over neighbours in a long run."""
    train = _thinned(train)
    both = [*train, *held_out]
    low, high = min(loss for _, loss in both), max(loss for _, loss in both)
    first, last = min(step for step, _ in both), max(step for step, _ in both)

    def place(step: float, loss: float) -> tuple[float, float]:
        across = (step - first) / (last - first or 1)
        up = (loss - low) / (high - low or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    def line(points: Points, colour: str, width: float) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    levels = [low + part * (high - low) for part in (0, 0.25, 0.5, 0.75, 1)]
    marks = [place(*point) for point in held_out]
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *(_level(level, place(first, level)[1]) for level in levels),
        *(_text(place(step, low)[0], HEIGHT - BOTTOM + 16, f"{step:,}", side) for step, side in _ends(first, last)),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "optimizer step"),
        _text(LEFT, 20, "training loss", "start", TRAIN),
        _text(LEFT + 110, 20, "held-out loss", "start", HELD_OUT) if held_out else "",
        line(train, TRAIN, 1.5),
        line(held_out, HELD_OUT, 2),
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{HELD_OUT}"/>' for x, y in marks),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
    head += 'font-family="sans-serif" font-size="12" role="img" aria-label="loss over optimizer steps">'
    return "\n".join([head, *filter(None, parts), "</svg>"]) + "\n"


def _thinned(points: Points) -> Points:
    size = -(-len(points) // MOST) or 1
    parts = [points[place : place + size] for place in range(0, len(points), size)]
    return [(part[-1][0], fmean(loss for _, loss in part)) for part in parts]


def _ends(first: int, last: int) -> list[tuple[int, str]]:
    return [(first, "start"), (last, "end")] if last > first else [(first, "start")]


def _level(loss: float, y: float) -> str:
    grid = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>'
    return grid + _text(LEFT - 6, y + 4, f"{loss:.3g}", "end")


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#404040") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
