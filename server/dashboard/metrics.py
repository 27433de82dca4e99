"""What Prometheus is told: the entries of `METRICS` with the labels of `LABELS`, and nothing else.

Losses, counts of examples, scores, similarities and values are in none of them.

Reference:
    Prometheus exposition formats, text format 0.0.4.
"""

from collections import defaultdict
from typing import Final

from fedmosaic.protos.messages import Phase
from fedmosaic.server.dashboard.records import Snapshot

METRICS: Final = {
    "fedmosaic_members": ("gauge", "Members on the roster."),
    "fedmosaic_enrolled": ("gauge", "Members on the roster that have ever enrolled."),
    "fedmosaic_rounds": ("gauge", "Rounds that the run has."),
    "fedmosaic_round": ("gauge", "Round that is open or being aggregated; rounds + 1 at the end."),
    "fedmosaic_finished": ("gauge", "1 once all rounds are over."),
    "fedmosaic_uploads": ("gauge", "Uploads of the open round that are stored."),
    "fedmosaic_awaited": ("gauge", "Members that the open round waits for."),
    "fedmosaic_deadline_timestamp_seconds": ("gauge", "When it stops waiting, unless below the quorum."),
    "fedmosaic_server_timestamp_seconds": ("gauge", "When the server said last that it lives."),
    "fedmosaic_last_round_seconds": ("gauge", "What the last closed round took to aggregate."),
    "fedmosaic_last_round_recipients": ("gauge", "Members to whom it gave an aggregate."),
    "fedmosaic_received_bytes_total": ("counter", "Bytes received from a member."),
    "fedmosaic_sent_bytes_total": ("counter", "Bytes sent to a member."),
    "fedmosaic_refused_total": ("counter", "Refusals in the audit log, which has one a minute of each kind."),
    "fedmosaic_reported_epsilon": ("gauge", "Joint epsilon of a member's statement, against an adversary."),
    "fedmosaic_certificate_expiry_timestamp_seconds": ("gauge", "When the server's certificate expires."),
}
LABELS: Final = frozenset({"member", "adversary", "reason"})
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def exposition(seen: Snapshot) -> str:
    """All metrics of a server, in Prometheus's text format."""
    lines = []
    samples = _samples(seen)
    for name, (kind, words) in METRICS.items():
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labelled(labels)} {_number(value)}" for labels, value in samples.pop(name, ())]
    if samples:
        raise AssertionError(f"not on the list: {', '.join(samples)}")
    return "\n".join(lines) + "\n"


def _samples(seen: Snapshot) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: defaultdict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)

    def add(name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            found[f"fedmosaic_{name}"].append((labels, value))

    add("members", len(seen.settings.members))
    add("enrolled", len(seen.enrolled))
    add("rounds", seen.settings.terms.schedule.rounds)
    add("certificate_expiry_timestamp_seconds", seen.expires)
    if (status := seen.status) is not None:
        add("round", status.round)
        add("finished", status.phase is Phase.FINISHED)
        add("uploads", len(status.arrived))
        add("awaited", len(status.waiting_for))
        add("deadline_timestamp_seconds", status.until)
        add("server_timestamp_seconds", status.at)
    for last in seen.rounds[:1]:
        add("last_round_seconds", last.get("seconds_aggregating"))
        add("last_round_recipients", len(last.get("received", ())))
    for member, counted in seen.traffic.items():
        add("received_bytes_total", counted["received"], member=member)
        add("sent_bytes_total", counted["sent"], member=member)
    for reason, count in sorted(seen.refused.items()):
        add("refused_total", count, reason=reason)
    for member, guarantees in seen.reported.items():
        for adversary, guarantee in (guarantees or {}).items():
            add("reported_epsilon", guarantee.epsilon, member=member, adversary=adversary)
    return found


def _labelled(labels: dict[str, str]) -> str:
    if not labels.keys() <= LABELS:
        raise AssertionError(f"not on the list: {', '.join(labels)}")
    pairs = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else repr(value + 0)
