"""The last lines of a client: where the result is, whether sharing helped, what was told, what to do next."""

import shlex
import textwrap
from pathlib import Path

from fedmosaic.client.result.card import guarantees
from fedmosaic.client.result.comparison import Comparison
from fedmosaic.privacy.statement.models import PrivacyStatement
from fedmosaic.privacy.statement.plain import delta_text, epsilon_text, trust

_COLUMNS = 80


def epsilon_line(statement: PrivacyStatement) -> str:
    """The member's ε over all that it sent, towards the server and towards colluding recipients."""
    found = guarantees(statement, "joint")
    server, recipients = found["server_honest_but_curious"].epsilon, found["colluding_recipients"].epsilon
    client = statement.clients[0]
    return (
        f"{trust(client)} ε = {epsilon_text(server)} towards the server, {epsilon_text(recipients)} towards "
        f"recipients who work together (one {client.unit}, δ {delta_text(client.delta)}; what ε means: "
        "docs/privacy.md)"
    )


def last_lines(
    state: Path, adapter: Path | None, comparison: Comparison | None, statement: PrivacyStatement
) -> str:
    """What a client says at its end, in 80 columns where no path is longer.

    Without an adapter none was trained, and without a comparison there are no own test rows.
    """
    lines = [""]
    if comparison is not None:
        rows = comparison.over_base.rows
        lines.append(f"Own test rows  {rows}, right by {comparison.measure}")
        lines += [f"  {name:<12} {score:.2f}" for name, score in comparison.scores.items()]
        if comparison.commonest is not None:
            lines.append(f"  {'one answer':<12} {comparison.commonest:.2f}  (always the commonest)")
        words = " ".join(filter(None, (comparison.verdict(), comparison.warning())))
        lines += textwrap.wrap(words, _COLUMNS, break_long_words=False)
    lines.append(f"Adapter        {adapter or 'none was trained'}")
    lines += textwrap.wrap(f"Privacy        {epsilon_line(statement)}", _COLUMNS, subsequent_indent=" " * 15)
    place = shlex.quote(str(state))
    lines += ["Next", f"  fedmosaic report {place}"]
    if adapter is not None:
        lines += [f"  fedmosaic export {place} --out my-model", f"  fedmosaic chat {place}"]
    return "\n".join(lines)
