"""A server and clients that cheat: every attempt goes through the real session, and must be refused.

A federation of five clients runs in this process with the real sessions, coordinator, key agreement and
encryption; only the model is replaced by a vector. One line of it is tampered with, and what counts is
whether the victim loads what it was given.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.experiments.attacks.refusals.stand_in import (
    MEMBERS,
    ROUNDS,
    VectorLearner,
    configuration,
    run_sessions,
)
from fedmosaic.experiments.attacks.statistics.results import RefusalResult
from fedmosaic.experiments.scenario.quiet_log import quiet_log
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.privacy.federation import kits as federation
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError
from fedmosaic.protos.messages import Aggregate, AggregateSection, RoundStatus, Upload, WeightRow
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit

_VICTIM, _OTHER = MEMBERS[:2]
_SERVER, _CLIENT = "server", "client"

TamperAggregate = Callable[["Line", Aggregate], Aggregate]
TamperUpload = Callable[["Line", Upload], Upload]


@dataclass
class Line:
    """The victim's line to the server, in the hands of whoever cheats.

    Attributes:
        coordinator: the real server.
        signing_keys: identity key of every member that cheats along.
        on_aggregate: changes what the victim receives in the last round.
        on_upload: changes what the client sends in the last round.
        earlier: what passed in earlier rounds.
        refused_upload: the server's answer to a changed upload; empty if it was taken.
        sent: whether a changed upload was sent at all.
    """

    coordinator: Coordinator
    signing_keys: Mapping[str, Ed25519PrivateKey]
    on_aggregate: TamperAggregate | None = None
    on_upload: TamperUpload | None = None
    earlier: list[Any] = field(default_factory=list)
    refused_upload: str = ""
    sent: bool = False


class _TamperedTransport:
    """The in-process transport with a cheat on the line."""

    def __init__(self, inner: InProcessTransport, line: Line) -> None:
        self._inner, self._line = inner, line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def pull(self, round_number: int, on_wait: Callable[[RoundStatus], None] | None = None) -> Aggregate:
        aggregate = self._inner.pull(round_number, on_wait)
        if aggregate.round == ROUNDS and self._line.on_aggregate is not None:
            return self._line.on_aggregate(self._line, aggregate)
        self._line.earlier.append(aggregate)
        return aggregate

    def push(self, upload: Upload) -> Any:
        line = self._line
        if upload.round == ROUNDS and line.on_upload is not None:
            line.sent = True
            try:
                self._inner.push(line.on_upload(line, upload))
            except FedMosaicError as error:
                line.refused_upload = str(error)
        line.earlier.append(upload)
        return self._inner.push(upload)


def refusals() -> tuple[RefusalResult, ...]:
    """Carry out every attempt, each in a federation of its own.

    Raises:
        ConfigurationError: the federation did not run to its end, so that nothing was shown.
    """
    with quiet_log(logging.WARNING):
        return (
            _honest(),
            *(_against_client(words, tamper) for words, tamper in AGGREGATE_ATTACKS.items()),
            *(_against_server(words, tamper) for words, tamper in UPLOAD_ATTACKS.items()),
        )


def _section(aggregate: Aggregate) -> tuple[AggregateSection, WeightRow]:
    section = aggregate.sections[0]
    if section.row is None:
        raise ConfigurationError(f"the federation refused its own aggregate: {section.refusal}")
    return section, section.row


def _with_row(aggregate: Aggregate, shares: Mapping[str, float]) -> Aggregate:
    section, agreed = _section(aggregate)
    total = 1 << agreed.bits
    weights = [round(share * total) for share in shares.values()]
    weights[0] += total - sum(weights)
    row = WeightRow(tuple(shares), tuple(weights), agreed.bits)
    return replace(aggregate, sections=(replace(section, row=row),))


def _row(shares: Mapping[str, float]) -> TamperAggregate:
    return lambda _line, aggregate: _with_row(aggregate, shares)


def _other_row(_line: Line, aggregate: Aggregate) -> Aggregate:
    """A row that keeps the policy, but is not the one that the sum was made with."""
    _, row = _section(aggregate)
    return _with_row(
        aggregate, dict(zip(row.contributors, (0.4, 0.3, 0.2, 0.1)[: len(row.weights)], strict=False))
    )


def _other_recipient(line: Line, aggregate: Aggregate) -> Aggregate:
    """What another member was to receive."""
    theirs = line.coordinator.pull(_OTHER, ROUNDS)
    if theirs is None:
        raise ConfigurationError("the other member's aggregate is not there yet")
    return replace(aggregate, sections=theirs.sections)


def _other_payload(line: Line, aggregate: Aggregate) -> Aggregate:
    """Another member's sum under the victim's own row."""
    theirs = line.coordinator.pull(_OTHER, ROUNDS)
    section, _ = _section(aggregate)
    payload = theirs.sections[0].payload if theirs is not None else b""
    return replace(aggregate, sections=(replace(section, payload=payload),))


def _replayed(line: Line, aggregate: Aggregate) -> Aggregate:
    """The aggregate of the round before."""
    earlier = next(a for a in line.earlier if isinstance(a, Aggregate) and a.sections)
    return replace(aggregate, sections=earlier.sections)


def _flipped(_line: Line, aggregate: Aggregate) -> Aggregate:
    section, _ = _section(aggregate)
    payload = bytearray(section.payload)
    payload[10] ^= 1
    return replace(aggregate, sections=(replace(section, payload=bytes(payload)),))


def _cut(_line: Line, aggregate: Aggregate) -> Aggregate:
    section, _ = _section(aggregate)
    return replace(aggregate, sections=(replace(section, payload=section.payload[:-8]),))


def _old_epoch(_line: Line, aggregate: Aggregate) -> Aggregate:
    return replace(aggregate, key_epoch=aggregate.key_epoch + 1)


AGGREGATE_ATTACKS: Final[Mapping[str, TamperAggregate]] = {
    "one-hot weight row": _row({"ben": 1.0}),
    "two contributors": _row({"ben": 0.5, "cid": 0.5}),
    "a weight above the cap": _row({"ben": 0.8, "cid": 0.1, "dee": 0.1}),
    "one large weight, the others one unit": _row({"ben": 1 - 2**-11, "cid": 2**-12, "dee": 2**-12}),
    "two weights of nearly one half, the other one small": _row({"ben": 0.4995, "cid": 0.4995, "dee": 0.001}),
    "the recipient in its own row": _row({"ada": 0.4, "ben": 0.2, "cid": 0.2, "dee": 0.2}),
    "a fake member in the row": _row({"ben": 0.4, "cid": 0.3, "mallory": 0.3}),
    "another row than the sum was made with": _other_row,
    "another member's aggregate and row": _other_recipient,
    "another member's sum under the own row": _other_payload,
    "the aggregate of an earlier round, replayed": _replayed,
    "a flipped bit in the header of the sum": _flipped,
    "a sum cut short": _cut,
    "a key epoch that was never agreed on": _old_epoch,
}


def _foreign_signature(_line: Line, upload: Upload) -> Upload:
    return replace(upload, signature=Ed25519PrivateKey.generate().sign(b"upload"), attempt_id="f" * 32)


def _old_upload(line: Line, _upload: Upload) -> Upload:
    earlier = next(u for u in line.earlier if isinstance(u, Upload))
    return replace(earlier, round=ROUNDS, attempt_id="e" * 32)


def _altered_upload(_line: Line, upload: Upload) -> Upload:
    section = upload.sections[0]
    payload = section.payload[:-1] + bytes([section.payload[-1] ^ 1])
    return replace(upload, sections=(replace(section, payload=payload),), attempt_id="d" * 32)


UPLOAD_ATTACKS: Final[Mapping[str, TamperUpload]] = {
    "an upload signed with another key": _foreign_signature,
    "an upload of an earlier round, relabelled": _old_upload,
    "an upload altered after it was signed": _altered_upload,
}


def _honest() -> RefusalResult:
    """The control: without tampering everything is loaded, so that a refusal means something."""
    learner, _, answer = _run(None, None)
    if learner.received != [2, 3]:
        raise ConfigurationError(f"the federation for the attempts did not run: {answer}")
    return RefusalResult(
        attempt="control: nothing tampered with; both aggregates are loaded",
        party="nobody",
        tried=1,
        refused=1,
    )


def _against_client(words: str, tamper: TamperAggregate) -> RefusalResult:
    learner, _, answer = _run(tamper, None)
    if 2 not in learner.received:
        raise ConfigurationError(f"{words}: the untampered round 2 was not loaded either: {answer}")
    return RefusalResult(
        attempt=words, party=_SERVER, tried=1, refused=int(ROUNDS not in learner.received), answer=answer
    )


def _against_server(words: str, tamper: TamperUpload) -> RefusalResult:
    _, line, answer = _run(None, tamper)
    if not line.sent:
        raise ConfigurationError(f"{words}: it was never sent: {answer}")
    return RefusalResult(
        attempt=words,
        party=_CLIENT,
        tried=1,
        refused=int(bool(line.refused_upload)),
        answer=line.refused_upload,
    )


class _Answers(logging.Handler):
    """Collects what the victim's operator would read about the tampered round."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(f"round {ROUNDS}:") and "aggregate:" in message:
            self.lines.append(message.split("aggregate: ", 1)[1])


def _run(
    on_aggregate: TamperAggregate | None, on_upload: TamperUpload | None
) -> tuple[VectorLearner, Line, str]:
    """One federation with one tampered line; returns the victim, the line, and the operator's message."""
    answers = _Answers()
    logger = logging.getLogger("fedmosaic.client.session")
    logger.addHandler(answers)
    try:
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "federation"
            federation.create(configuration(), directory)
            (directory / "server/server.toml").write_text('listen = "127.0.0.1:0"\nstate_dir = "state"\n')
            server = settings_from_kit(directory / "server").model_copy(update={"durable": False})
            coordinator = Coordinator(server)
            line = Line(coordinator, {}, on_aggregate, on_upload)
            learner, errors = _sessions(directory, coordinator, line)
            coordinator.close()
    finally:
        logger.removeHandler(answers)
    return learner, line, "; ".join([*answers.lines, *errors])


def _sessions(directory: Path, coordinator: Coordinator, line: Line) -> tuple[VectorLearner, list[str]]:
    def transport_of(name: str) -> Any:
        inner = InProcessTransport(coordinator, name, patience_seconds=60.0)
        return _TamperedTransport(inner, line) if name == _VICTIM else inner

    learners, errors = run_sessions(directory, transport_of)
    return learners[_VICTIM], errors
