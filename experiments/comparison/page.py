"""A comparison as one self-contained page: tables, figures as inline SVG, nothing loaded from elsewhere."""

import datetime as dt
from collections.abc import Iterable, Sequence
from html import escape

from fedmosaic import __version__
from fedmosaic.experiments.comparison.figure import NAMESPACE, privacy_figure
from fedmosaic.experiments.comparison.runs import REFERENCE, Group
from fedmosaic.experiments.comparison.tables import (
    ACCURACY_HEADS,
    COST_HEADS,
    GAIN_HEADS,
    POOLED,
    accuracies,
    by_scenario,
    costs,
    epsilon_text,
    gains,
    overview,
    percent,
    pooled,
)
from fedmosaic.experiments.scenario.metrics import Interval

_COLOURS = ("#0b5fa5", "#c2571a", "#2f7d4f", "#8a3b8f", "#8c6d1f", "#5a5a5a", "#b3263a", "#1b8a8a")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_WIDTH, _LEFT, _RIGHT = 760, 40, 30

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 68rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ccc; white-space: nowrap; }
th:nth-child(1), td:nth-child(1) { text-align: left; }
td:nth-child(1) { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
thead th { border-bottom: 2px solid #1c1c1c; white-space: normal; max-width: 8rem; vertical-align: bottom; }
td.none { color: #b00020; font-weight: 600; }
figure { margin: 1.2rem 0; } figcaption { font-size: .9rem; color: #444; max-width: 48rem; }
svg { max-width: 100%; height: auto; } svg text { font: 13px system-ui, sans-serif; fill: #1c1c1c; }
code { background: #f2f2f2; padding: .1rem .3rem; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } h2, figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 8pt; }
  th, td { padding: .15rem .3rem; white-space: normal; } }
"""


def page(groups: Sequence[Group], command: str, reference: str = REFERENCE) -> str:
    """The page as HTML.

    Args:
        groups: at least one.
        command: that makes this page again.
        reference: the method that the others are compared with seed by seed.
    """
    scenarios = list(dict.fromkeys(group.scenario for group in groups))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>FedMosaic: {escape(', '.join(scenarios))}</title><style>{_STYLE}</style></head><body>",
        "<h1>Methods compared</h1>",
        f"<p>{sum(len(group.runs) for group in groups)} runs, made with fedmosaic {escape(__version__)}; "
        f"page of {dt.datetime.now(dt.UTC):%Y-%m-%d}. Accuracies are in per cent, averaged over the clients "
        "and then over seeds; ± is half the width of Student's 95 % interval over seeds.</p>",
        "<p>Self: the client's own tasks. Others: the other clients' tasks. A_last: after the last round. "
        "A_AUC: mean over the scored rounds. ε is the largest of any client, both channels together, towards "
        "the honest-but-curious server and towards another client; ∞ means no differential privacy. "
        "kB/round: what a client sends on average. TFLOP: measured operations of all clients' own training "
        "steps, without scoring, profiles and what a server distils. s: the whole run, all included.</p>",
    ]
    for figure, heads, cells in overview(groups):
        parts += [f"<h2>{escape(figure)}, all scenarios</h2>", _table(heads, cells)]
    together = gains(pooled(groups), reference)
    if together:
        explained = (
            f"What each method has over {reference}, in points, over all pairs of runs of one scenario and "
            "seed. The pairs of one seed have the order of their examples in common."
        )
        parts += [f"<h2>{escape(POOLED.capitalize())}</h2><p>{explained}</p>", _table(GAIN_HEADS, together)]
    for scenario, of_scenario in by_scenario(groups):
        rows = [(group.method, (*accuracies(group), *costs(group))) for group in of_scenario]
        parts += [f"<h2>{escape(scenario)}</h2>", _table((*ACCURACY_HEADS, *COST_HEADS), rows)]
        compared = gains(of_scenario, reference)
        if compared:
            explained = (
                f"What each method has over {reference}, in points, seed by seed: the luck of a seed, which "
                "both had, is taken out. An interval that holds 0 shows no difference."
            )
            parts += [f"<p>{explained}</p>", _table(GAIN_HEADS, compared)]
        if len({group.runs[0].protection for group in of_scenario} - {""}) > 1:
            drawn = privacy_figure(of_scenario, command).replace(f' xmlns="{NAMESPACE}"', "")
            caption = (
                "Accuracy and relevance over ε, by what protects the adapter; the table says who reads what."
            )
            parts.append(f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
        for index, what in ((0, "Self A_last"), (2, "Others A_last")):
            parts.append(_bars(of_scenario, index, what))
        parts.append(_curves(of_scenario, own=True))
        parts.append(_curves(of_scenario, own=False))
    parts.append(f"<h2>Made by</h2><p><code>{escape(command)}</code></p></body></html>")
    return "\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("method", *heads))
    lines = []
    for method, texts in rows:
        cells = (
            f"<td{' class=none' if text == '∞' else ''}>{escape(text)}</td>" for text in (method, *texts)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table>{body}</table></div>'


def _bars(groups: Sequence[Group], index: int, what: str) -> str:
    """Horizontal bars from 0 with intervals and ε."""
    top = _top(f for group in groups if (f := group.figures()[index]) is not None)
    height, scale = 44 * len(groups) + 50, (_WIDTH - _LEFT - _RIGHT - 130) / top
    shapes = [_axis(tick, _LEFT + tick * scale, height - 34, 10) for tick in range(0, top + 1, 10)]
    for number, group in enumerate(groups):
        figure = group.figures()[index]
        y = 26 + 44 * number
        shapes.append(f'<text x="{_LEFT}" y="{y - 5}">{escape(group.method)}</text>')
        if figure is None:
            shapes.append(f'<text x="{_LEFT + 4}" y="{y + 13}">not scored</text>')
            continue
        end = _LEFT + 100 * figure.mean * scale
        shapes.append(
            f'<rect x="{_LEFT}" y="{y}" width="{max(0.0, end - _LEFT):.1f}" height="18" '
            f'fill="{_COLOURS[number % len(_COLOURS)]}" opacity="0.85"/>'
        )
        if figure.half_width is not None:
            low = _LEFT + 100 * max(0.0, figure.mean - figure.half_width) * scale
            high = _LEFT + min(top, 100 * (figure.mean + figure.half_width)) * scale
            shapes.append(
                f'<path d="M{low:.1f} {y + 9}H{high:.1f}M{low:.1f} {y + 4}v10M{high:.1f} {y + 4}v10" '
                'stroke="#1c1c1c" stroke-width="1.5" fill="none"/>'
            )
            end = max(end, high)
        label = f"{percent(figure)}, ε {epsilon_text(group.epsilon('recipients'))}"
        shapes.append(f'<text x="{end + 8:.1f}" y="{y + 13}">{escape(label)}</text>')
    shapes.append(
        f'<text x="{_LEFT + top / 2 * scale:.0f}" y="{height - 4}" text-anchor="middle">accuracy, %</text>'
    )
    caption = f"{what} of every method with its 95 % interval over seeds and its ε towards recipients."
    return _figure(shapes, height, f"{what} by method", caption)


def _curves(groups: Sequence[Group], *, own: bool) -> str:
    """Accuracy over the rounds, means over seeds."""
    what = "Self" if own else "Others"
    bottom, top = 250, 14
    height = bottom + 62 + 18 * len(groups)
    last = max(number for group in groups for run in group.runs for number in run.curve)
    most = _top(
        Interval(value, None, 1)
        for group in groups
        for run in group.runs
        for pair in run.curve.values()
        if (value := pair.own if own else pair.others) is not None
    )
    scale_x, scale_y = (_WIDTH - _LEFT - _RIGHT) / max(1, last), (bottom - top) / most
    shapes = []
    for tick in range(0, most + 1, 10):
        y = bottom - tick * scale_y
        shapes.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd" fill="none"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for number in range(0, last + 1, max(1, last // 10)):
        shapes.append(
            f'<text x="{_LEFT + number * scale_x:.1f}" y="{bottom + 18}" text-anchor="middle">{number}</text>'
        )
    for place, group in enumerate(groups):
        points = []
        for number in sorted(set.intersection(*(set(run.curve) for run in group.runs))):
            pairs = [run.curve[number] for run in group.runs]
            values = [value for p in pairs if (value := p.own if own else p.others) is not None]
            if values:
                mean = sum(values) / len(values)
                points.append(f"{_LEFT + number * scale_x:.1f},{bottom - 100 * mean * scale_y:.1f}")
        colour, dash = _COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS) % len(_DASHES)]
        shapes.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
        y = bottom + 62 + 18 * place
        line = f'<path d="M{_LEFT} {y}h26" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        shapes.append(f'{line}<text x="{_LEFT + 34}" y="{y + 4}">{escape(group.method)}</text>')
    shapes.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{bottom + 40}" text-anchor="middle">round</text>'
    )
    caption = (
        f"{what}, in per cent, over the rounds; means over clients and seeds. Round 0 is before any training."
    )
    return _figure(shapes, height, f"{what} over the rounds", caption)


def _top(figures: Iterable[Interval]) -> int:
    """End of an axis in per cent: the first multiple of ten above everything, 100 at most."""
    ends = [100 * (figure.mean + (figure.half_width or 0.0)) for figure in figures]
    return min(100, 10 * (int(max(ends, default=99.0) // 10) + 1))


def _axis(tick: int, x: float, bottom: int, top: int) -> str:
    return (
        f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ddd" fill="none"/>'
        f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick}</text>'
    )


def _figure(shapes: Sequence[str], height: int, title: str, caption: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(shapes)}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
