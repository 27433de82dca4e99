"""The attack section of the privacy report: JSON, and Markdown with a ROC figure, for a terminal too."""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from rich.console import RenderableType
from rich.markdown import Markdown

from fedmosaic.experiments.attacks.statistics.results import AttackReport, AttackResult, Figure
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.configuration import read_configuration

JSON: Final = "attacks.json"
MARKDOWN: Final = "attacks.md"
ROC: Final = "attacks-roc.svg"

_SETTINGS: Final = {
    "product": "**product**",
    "no_sanitiser": "no sanitiser",
    "authors": "authors' sanitiser",
    "variant": "variant",
}
_LEAST_RATE: Final = 1e-4


def write(report: AttackReport, directory: Path) -> None:
    """Write the report as JSON and Markdown, and the ROC figure where there are curves."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / JSON).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (directory / MARKDOWN).write_text(markdown(report), encoding="utf-8")
    if any(result.curve for result in report.results):
        draw(report, directory / ROC)


def read(directory: Path) -> AttackReport | None:
    """The attack section that `write` left in a directory; None if there is none."""
    path = directory / JSON
    return read_configuration(path, AttackReport) if path.exists() else None


def markdown(report: AttackReport) -> str:
    """The report as a Markdown page."""
    duration = f"{report.seconds / 60:.1f} minutes"
    if report.processor_seconds is not None:
        duration += f" ({report.processor_seconds / 60:.1f} minutes of one core)"
    lines = [
        "# Attacks",
        "",
        f"Run `{report.run}`. Made by `{report.command}` on {report.machine}, {report.created}, "
        f"in {duration}. Do not edit: the command writes this page. "
        "What the figures mean, in plain words: [attacks-explained.md](attacks-explained.md).",
        "",
        "Square brackets hold 95 % intervals unless a note says otherwise; δ = 1e-5 throughout. What follows "
        "“≤” is what the claimed guarantee allows. A figure breaks its bound only if it is above it at a "
        "confidence of 99.99 %, because the strongest attacks sit exactly at their bound. "
        + _above_words(report),
        "",
        _verdict(report),
        "",
    ]
    if any(result.curve for result in report.results):
        lines += [f"![ROC curves of the membership attacks]({ROC})", ""]
    for attack, group in groupby(report.results, key=lambda result: result.attack):
        lines += _attack_lines(attack, list(group))
    rows = []
    for refusal in report.refusals:
        count = f"{refusal.refused} of {refusal.tried}" + (" **BROKEN**" if refusal.broken else "")
        answer = refusal.answer.replace("|", "/").replace("\n", " ")
        rows.append([refusal.party, refusal.attempt, count, answer])
    if rows:
        words = "Carried out against the real sessions, key agreement and coordinator; only the model is"
        table = markdown_table(["who", "attempt", "refused", "answer"], rows)
        lines += ["## Attempts that must be refused", "", f"{words} replaced.", "", *table, ""]
    if report.skipped:
        lines += ["## Not carried out", "", *(f"- {reason}" for reason in report.skipped), ""]
    return "\n".join(lines)


def render(report: AttackReport) -> RenderableType:
    """The page for a terminal, which ends with the verdict."""
    return Markdown(f"{markdown(report)}\n\n{_verdict(report)}")


def draw(report: AttackReport, path: Path) -> None:
    """Draw the ROC curves of each attack on logarithmic axes, one panel per statistic."""
    panels: dict[tuple[str, str], list[AttackResult]] = {}
    for result in report.results:
        if result.curve:
            panels.setdefault((result.attack, result.statistic), []).append(result)
    canvas = Canvas(figsize=(5.2 * len(panels), 5.4), layout="constrained")
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((attack, statistic), results) in zip(axes, panels.items(), strict=True):
        for result in results:
            points = [p for p in result.curve if p.false_positive_rate >= _LEAST_RATE]
            axis.plot(
                [p.false_positive_rate for p in points],
                [max(_LEAST_RATE, p.true_positive_rate) for p in points],
                label=result.release,
                linewidth=2.2 if result.setting == "product" else 1.1,
                linestyle="--" if result.setting in ("no_sanitiser", "authors") else "-",
            )
        axis.plot([_LEAST_RATE, 1.0], [_LEAST_RATE, 1.0], color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="false positive rate", ylabel="true positive rate")
        axis.set_title(f"{attack}:\n{statistic}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=6)
    # Without a date, the same figures give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "fedmosaic"}):
        canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _above_words(report: AttackReport) -> str:
    """How many intervals lie wholly above their ceiling, beside how many do so by chance alone."""
    bounded = [
        (
            figure.low > figure.bound,
            f"{figure.name} of {result.statistic} on {result.release}: "
            f"{_value(figure)}, ceiling {_number(figure.bound)}",
        )
        for result in report.results
        for figure in result.figures
        # Other low ends, such as those of a certified ε, are no ends of an interval.
        if figure.bound is not None and figure.name.startswith(("AUC", "TPR"))
    ]
    if not bounded:
        return ""
    above = [words for is_above, words in bounded if is_above]
    return (
        f"{len(above)} of {len(bounded)} intervals here lie wholly above their ceiling; where an attack "
        "reaches its ceiling, one in forty does by chance"
        + (f". They are: {'; '.join(above)}." if above else ".")
    )


def _verdict(report: AttackReport) -> str:
    if report.alarms:
        alarms = "\n".join(f"- {alarm}" for alarm in report.alarms)
        return f"**BROKEN. Either an attack or a guarantee is wrong:**\n\n{alarms}"
    if not report.results and not report.refusals:
        return "**Nothing was carried out, so nothing is shown.**"
    said = ["No bound is broken"] if report.results else []
    tried = sum(refusal.tried for refusal in report.refusals)
    return f"**{', and '.join([*said, *([f'all {tried} attempts were refused'] if tried else [])])}.**"


def _attack_lines(attack: str, results: Sequence[AttackResult]) -> list[str]:
    lines = [f"## {attack}", ""]
    for headline in dict.fromkeys(result.headline for result in results if result.headline):
        lines += [f"**{headline}.**", ""]
    for adversary, sees in dict.fromkeys((result.adversary, result.sees) for result in results):
        lines.append(f"- Adversary: {adversary}. Sees: {sees}.")
    if any(result.by_design for result in results):
        lines.append("- Success here is by design: it is what the release is for.")
    lines.append("")
    names = list(dict.fromkeys(figure.name for result in results for figure in result.figures))
    for statistic in dict.fromkeys(result.statistic for result in results):
        heads = ["release", "", *(["ε", *names] if len(names) <= 3 else ["figure", "value"])]
        rows = []
        for result in (each for each in results if each.statistic == statistic):
            what, figures = [result.release, _SETTINGS[result.setting]], {f.name: f for f in result.figures}
            if len(names) <= 3:
                cells = (_cell(figures[name]) if name in figures else "-" for name in names)
                rows.append([*what, _epsilon(result.epsilon), *cells])
                continue
            for number, (name, figure) in enumerate(figures.items()):
                rows.append([*(["", ""] if number else what), name, _cell(figure)])
        lines += [f"Statistic: {statistic}.", "", *markdown_table(heads, rows), ""]
    for note in dict.fromkeys(result.note for result in results if result.note):
        lines += [f"{note[0].upper()}{note[1:]}.", ""]
    return lines


def _cell(figure: Figure) -> str:
    bound = f" ≤ {_number(figure.bound)}" if figure.bound is not None else ""
    return _value(figure) + bound + (" **BROKEN**" if figure.broken else "")


def _value(figure: Figure) -> str:
    if figure.low == figure.value == figure.high:
        return _number(figure.value)
    high = "-" if figure.high >= 1e3 else _number(figure.high)
    return f"{_number(figure.value)} [{_number(figure.low)}, {high}]"


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if abs(value) < 5e-5:
        return f"{value:.0e}"
    return f"{value:.4f}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _epsilon(epsilon: float | None) -> str:
    if epsilon is None:
        return "-"
    return "∞" if math.isinf(epsilon) else f"{epsilon:.2g}" if epsilon < 1.0 else f"{epsilon:.3g}"
