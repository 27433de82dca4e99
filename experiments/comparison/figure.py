"""Privacy against utility as one figure: accuracy and relevance over ε, by how the adapter is protected.

What stands on the axis is not the target but the ε that the clients' ledgers came to, the largest of any of
them, both channels together, towards another member. `none` and `encrypted` stand at infinity: their adapter
has no ε, whatever the profile's is. The table below the panels says what each reader's ε is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from fedmosaic.experiments.comparison.runs import Group, Run
from fedmosaic.experiments.comparison.tables import epsilon_text
from fedmosaic.experiments.scenario.metrics import Interval, interval
from fedmosaic.protos.errors import ConfigurationError

NAMESPACE: Final = "http://www.w3.org/2000/svg"

_COLOURS: Final = {"none": "#0b5fa5", "encrypted": "#1b8a8a", "dp": "#c2571a", "dp+encrypted": "#8a3b8f"}
_MARKS: Final = {"none": "square", "encrypted": "diamond", "dp": "circle", "dp+encrypted": "triangle"}
_NAMES: Final = {
    "none": "none: adapter in the clear",
    "encrypted": "encrypted: server sees ciphertext",
    "dp": "dp: noise on all that leaves",
    "dp+encrypted": "dp+encrypted: both",
}
_PANELS: Final[tuple[tuple[str, Callable[[Run], float | None]], ...]] = (
    ("Self A_last, %", lambda run: run.summary.last.own),
    ("Others A_last, %", lambda run: run.summary.last.others),
    ("relevance, AUC in %", lambda run: run.relevance),
)
_REFERENCES: Final = ("local", "fedavg")
_WIDTH, _PANEL, _GAP, _LEFT, _TOP, _BOTTOM = 960, 250, 62, 46, 48, 268
_INFINITY_GAP: Final = 1.6


@dataclass(frozen=True)
class _Point:
    protection: str
    epsilon: float
    figures: tuple[Interval | None, ...]


def privacy_figure(groups: Sequence[Group], command: str) -> str:
    """The figure as SVG.

    Args:
        groups: runs of FedMosaic that differ in protection and noise, and of `local` and `fedavg` for lines.
        command: that makes this figure again.

    Raises:
        ConfigurationError: no run has a server of FedMosaic's, or the runs are of several scenarios.
    """
    private = [group for group in groups if group.runs[0].protection]
    scenarios = {group.scenario for group in groups}
    if not private or len(scenarios) != 1:
        raise ConfigurationError(
            f"a privacy figure of {len(private)} private methods on {len(scenarios)} scenarios; give runs of "
            "fedmosaic on one scenario"
        )
    points = [_point(group) for group in private]
    references = {group.method: _figures(group) for group in groups if group.method in _REFERENCES}
    place = _axis_of([point.epsilon for point in points])
    shapes = [_text(_LEFT, 20, f"Privacy against utility: {next(iter(scenarios))}", size=16, weight=600)]
    for number, (title, _) in enumerate(_PANELS):
        left = _LEFT + number * (_PANEL + _GAP)
        shapes += _panel(left, title, number, points, references, place)
    y = _BOTTOM + 62
    shapes += _legend(points, references, y)
    y += 22 * math.ceil((len({p.protection for p in points}) + len(references)) / 3) + 18
    rows, y = _readers(private, y)
    shapes += rows
    seeds = sorted({len(group.runs) for group in groups})
    shapes.append(
        _text(
            _LEFT,
            y + 12,
            f"{_bars(seeds)} ε is the largest of any client.",
            size=11,
        )
    )
    height = y + 26
    return (
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif">'
        f"<title>Privacy against utility</title><desc>{escape(command)}</desc>"
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )


def _bars(seeds: Sequence[int]) -> str:
    if seeds[-1] == 1:
        return "One seed, so that there is no interval."
    return f"Bars: 95 % interval over {'–'.join(map(str, seeds))} seeds."


def _figures(group: Group) -> tuple[Interval | None, ...]:
    columns = [[value(run) for run in group.runs] for _, value in _PANELS]
    return tuple(
        interval([value for value in column if value is not None]) if None not in column else None
        for column in columns
    )


def _point(group: Group) -> _Point:
    epsilon = group.epsilon("recipients")
    return _Point(group.runs[0].protection, math.inf if epsilon is None else epsilon, _figures(group))


def _axis_of(values: Sequence[float]) -> Callable[[float], float]:
    """Share of a panel's width at which an ε stands: logarithmic, with infinity apart on the right."""
    finite = [math.log2(value) for value in values if 0 < value < math.inf] or [0.0]
    low, high = min(finite) - 0.6, max(finite) + 0.6 + _INFINITY_GAP

    def place(epsilon: float) -> float:
        position = high - 0.5 if epsilon == math.inf else math.log2(max(epsilon, 2**low))
        return (position - low) / (high - low)

    return place


def _panel(
    left: int,
    title: str,
    number: int,
    points: Sequence[_Point],
    references: Mapping[str, tuple[Interval | None, ...]],
    place: Callable[[float], float],
) -> list[str]:
    figures = [f for p in points if (f := p.figures[number]) is not None]
    figures += [f for r in references.values() if (f := r[number]) is not None]
    ends = [100 * (f.mean + side * (f.half_width or 0.0)) for f in figures for side in (-1, 1)]
    low = max(0, 10 * math.floor(min(ends, default=0.0) / 10))
    low = min(low, 90)
    high = max(low + 10, min(100, 10 * math.ceil(max(ends, default=100.0) / 10)))

    def height(share: float) -> float:
        return _BOTTOM - (min(high, max(low, 100 * share)) - low) / (high - low) * (_BOTTOM - _TOP - 12)

    shapes = [_text(left, _TOP - 2, title, weight=600)]
    for tick in range(low, high + 1, 10 if high - low > 20 else 5):
        y = height(tick / 100)
        shapes.append(f'<path d="M{left} {y:.1f}h{_PANEL}" stroke="#ddd"/>')
        shapes.append(_text(left - 6, y + 4, str(tick), anchor="end"))
    for epsilon in _ticks(points):
        x = left + _PANEL * place(epsilon)
        shapes.append(f'<path d="M{x:.1f} {_BOTTOM}v5" stroke="#1c1c1c"/>')
        shapes.append(_text(x, _BOTTOM + 18, "∞" if epsilon == math.inf else f"{epsilon:g}", anchor="middle"))
    shapes.append(_text(left + _PANEL / 2, _BOTTOM + 36, "ε (small: more private)", anchor="middle"))
    for name, values in references.items():
        figure = values[number]
        if figure is not None:
            dash = "2 4" if name == "local" else "8 4"
            y = height(figure.mean)
            shapes.append(
                f'<path d="M{left} {y:.1f}h{_PANEL}" stroke="#5a5a5a" stroke-width="1.5" '
                f'stroke-dasharray="{dash}"/>'
            )
    for protection in dict.fromkeys(point.protection for point in points):
        own = sorted((p for p in points if p.protection == protection), key=lambda p: p.epsilon)
        shapes += _series(own, number, lambda e: left + _PANEL * place(e), height)
    return shapes


def _series(
    own: Sequence[_Point], number: int, across: Callable[[float], float], height: Callable[[float], float]
) -> list[str]:
    colour = _COLOURS[own[0].protection]
    shift = 4 * (list(_COLOURS).index(own[0].protection) - 1.5)
    shapes, line = [], []
    for point in own:
        figure = point.figures[number]
        if figure is None:
            continue
        x, y = across(point.epsilon) + shift, height(figure.mean)
        line.append(f"{x:.1f},{y:.1f}")
        if figure.half_width is not None:
            top, bottom = height(figure.mean + figure.half_width), height(figure.mean - figure.half_width)
            shapes.append(f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        shapes.append(_mark(_MARKS[point.protection], x, y, colour))
    joined = " ".join(line)
    return [f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *shapes]


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "triangle": ((0, -6), (5.5, 4), (-5.5, 4)),
    }[kind]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}" fill="{colour}"/>'


def _ticks(points: Sequence[_Point]) -> list[float]:
    finite = [p.epsilon for p in points if p.epsilon < math.inf]
    ticks = [t for t in (0.1, 0.3, 1, 3, 8, 20, 50) if finite and min(finite) / 1.5 <= t <= max(finite) * 1.5]
    return [*ticks, *([math.inf] if len(finite) < len(points) else [])]


def _legend(points: Sequence[_Point], references: Mapping[str, object], y: int) -> list[str]:
    entries = [
        _mark(_MARKS[name], 0, -4, _COLOURS[name]) + _text(14, 0, _NAMES[name])
        for name in dict.fromkeys(point.protection for point in points)
    ]
    words = {"local": "local: nothing leaves, ε = 0", "fedavg": "fedavg: in the clear, ε = ∞"}
    for name in references:
        dash = "2 4" if name == "local" else "8 4"
        line = f'<path d="M-8 -4h18" stroke="#5a5a5a" stroke-width="1.5" stroke-dasharray="{dash}"/>'
        entries.append(line + _text(14, 0, words[name]))
    return [
        f'<g transform="translate({_LEFT + 8 + 300 * (i % 3)} {y + 22 * (i // 3)})">{entry}</g>'
        for i, entry in enumerate(entries)
    ]


def _readers(groups: Sequence[Group], y: int) -> tuple[list[str], int]:
    """What every run's ε is towards the two readers, as a small table."""
    columns = (0, 330, 480, 760)
    heads = ("who reads what: ε of adapter and profile", "profile alone", "the server", "another member")
    shapes = [_text(_LEFT + x, y, head, weight=600) for x, head in zip(columns, heads, strict=True)]
    for group in groups:
        y += 19
        cells = (group.method, _profile(group), _reader(group, "server"), _reader(group, "recipients"))
        shapes += [_text(_LEFT + x, y, cell) for x, cell in zip(columns, cells, strict=True)]
    return shapes, y + 10


def _reader(group: Group, reader: str) -> str:
    value = group.epsilon(reader)
    if reader == "server" and group.runs[0].protection == "encrypted":
        return f"adapter: ciphertext; profile {_profile(group)}"
    return epsilon_text(value)


def _profile(group: Group) -> str:
    known = [run.profile_epsilon for run in group.runs if run.profile_epsilon is not None]
    return epsilon_text(max(known)) if known else "-"


def _text(x: float, y: float, words: str, *, size: int = 13, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#1c1c1c">{escape(words)}</text>'
    )
