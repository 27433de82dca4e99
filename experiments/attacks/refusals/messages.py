"""A server and clients that cheat: every attempt goes through the real session, and must be refused.

Five clients run in this process with the real sessions, coordinator, key agreement and encryption; only the
model is a vector. One line is tampered with, and what counts is whether the victim loads what it was given.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.experiments.attacks.refusals import stand_in
from fedmosaic.experiments.attacks.statistics.results import RefusalResult
from fedmosaic.experiments.scenario.quiet_log import quiet_log
from fedmosaic.experiments.simulation.transport import InProcessTransport
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError
from fedmosaic.protos.messages import Aggregate, AggregateSection, Receipt, RoundStatus, Upload, WeightRow
from fedmosaic.server.coordinator import Coordinator

_VICTIM, _OTHER = stand_in.MEMBERS[:2]

TamperAggregate = Callable[["Line", Aggregate], Aggregate]
TamperUpload = Callable[["Line", Upload], Upload]


class Line(InProcessTransport):
    """The victim's line to the server, in the hands of whoever cheats in the last round.

    `refused_upload` is the server's answer to a changed upload, empty if it was taken, None if none was sent.
    """

    def __init__(
        self, coordinator: Coordinator, on_aggregate: TamperAggregate | None, on_upload: TamperUpload | None
    ) -> None:
        super().__init__(coordinator, _VICTIM, patience_seconds=60.0)
        self.coordinator = coordinator
        self.aggregates: list[Aggregate] = []
        self.uploads: list[Upload] = []
        self.refused_upload: str | None = None
        self._on_aggregate, self._on_upload = on_aggregate, on_upload

    def pull(self, round_number: int, on_wait: Callable[[RoundStatus], None] | None = None) -> Aggregate:
        """Change what comes."""
        aggregate = super().pull(round_number, on_wait)
        if aggregate.round == stand_in.ROUNDS and self._on_aggregate is not None:
            return self._on_aggregate(self, aggregate)
        self.aggregates.append(aggregate)
        return aggregate

    def push(self, upload: Upload) -> Receipt:
        """Send a changed upload first, then what is due."""
        if upload.round == stand_in.ROUNDS and self._on_upload is not None:
            self.refused_upload = ""
            try:
                super().push(self._on_upload(self, upload))
            except FedMosaicError as error:
                self.refused_upload = str(error)
        self.uploads.append(upload)
        return super().push(upload)


def refusals() -> tuple[RefusalResult, ...]:
    """Carry out every attempt; `ConfigurationError` if a federation did not run, and nothing was shown."""
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


def _row(**shares: float) -> TamperAggregate:
    return lambda _line, aggregate: _with_row(aggregate, shares)


def _other_row(_line: Line, aggregate: Aggregate) -> Aggregate:
    """A row that keeps the policy, but is not the one that the sum was made with."""
    contributors = _section(aggregate)[1].contributors
    return _with_row(aggregate, dict(zip(contributors, (0.4, 0.3, 0.2, 0.1), strict=False)))


def _theirs(line: Line) -> AggregateSection:
    """What another member was to receive."""
    aggregate = line.coordinator.pull(_OTHER, stand_in.ROUNDS)
    if aggregate is None:
        raise ConfigurationError("the other member's aggregate is not there yet")
    return aggregate.sections[0]


def _sum(aggregate: Aggregate) -> bytes:
    return _section(aggregate)[0].payload


def _payload(aggregate: Aggregate, payload: bytes) -> Aggregate:
    return replace(aggregate, sections=(replace(_section(aggregate)[0], payload=payload),))


AGGREGATE_ATTACKS: Final[Mapping[str, TamperAggregate]] = {
    "one-hot weight row": _row(ben=1.0),
    "two contributors": _row(ben=0.5, cid=0.5),
    "a weight above the cap": _row(ben=0.8, cid=0.1, dee=0.1),
    "one large weight, the others one unit": _row(ben=1 - 2**-11, cid=2**-12, dee=2**-12),
    "two weights of nearly one half, the other one small": _row(ben=0.4995, cid=0.4995, dee=0.001),
    "the recipient in its own row": _row(ada=0.4, ben=0.2, cid=0.2, dee=0.2),
    "a fake member in the row": _row(ben=0.4, cid=0.3, mallory=0.3),
    "another row than the sum was made with": _other_row,
    "another member's aggregate and row": lambda line, sent: replace(sent, sections=(_theirs(line),)),
    "another member's sum under the own row": lambda line, sent: _payload(sent, _theirs(line).payload),
    "the aggregate of an earlier round, replayed": lambda line, sent: replace(
        sent, sections=next(earlier.sections for earlier in line.aggregates if earlier.sections)
    ),
    "a flipped bit in the header of the sum": lambda _, sent: _payload(sent, _flipped(_sum(sent), 10)),
    "a sum cut short": lambda _, sent: _payload(sent, _sum(sent)[:-8]),
    "a key epoch that was never agreed on": lambda _, sent: replace(sent, key_epoch=sent.key_epoch + 1),
}


def _flipped(payload: bytes, place: int) -> bytes:
    changed = bytearray(payload)
    changed[place] ^= 1
    return bytes(changed)


UPLOAD_ATTACKS: Final[Mapping[str, TamperUpload]] = {
    "an upload signed with another key": lambda _, upload: replace(
        upload, signature=Ed25519PrivateKey.generate().sign(b"upload"), attempt_id="f" * 32
    ),
    "an upload of an earlier round, relabelled": lambda line, _: replace(
        line.uploads[0], round=stand_in.ROUNDS, attempt_id="e" * 32
    ),
    "an upload altered after it was signed": lambda _, upload: replace(
        upload,
        sections=(replace(upload.sections[0], payload=_flipped(upload.sections[0].payload, -1)),),
        attempt_id="d" * 32,
    ),
}


def _honest() -> RefusalResult:
    """The control: without tampering everything is loaded, so that a refusal means something."""
    learner, _, answer = _run()
    if learner.received != [2, 3]:
        raise ConfigurationError(f"the federation for the attempts did not run: {answer}")
    words = "control: nothing tampered with; both aggregates are loaded"
    return RefusalResult(attempt=words, party="nobody", refused=1)


def _against_client(words: str, tamper: TamperAggregate) -> RefusalResult:
    learner, _, answer = _run(on_aggregate=tamper)
    if 2 not in learner.received:
        raise ConfigurationError(f"{words}: the untampered round 2 was not loaded either: {answer}")
    refused = stand_in.ROUNDS not in learner.received
    return RefusalResult(attempt=words, party="server", refused=int(refused), answer=answer)


def _against_server(words: str, tamper: TamperUpload) -> RefusalResult:
    _, line, failure = _run(on_upload=tamper)
    answer = line.refused_upload
    if answer is None:
        raise ConfigurationError(f"{words}: it was never sent: {failure}")
    return RefusalResult(attempt=words, party="client", refused=int(bool(answer)), answer=answer)


class _Answers(logging.Handler):
    """Collects what the victim's operator would read about the tampered round."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(f"round {stand_in.ROUNDS}:") and "aggregate:" in message:
            self.lines.append(message.split("aggregate: ", 1)[1])


def _run(
    on_aggregate: TamperAggregate | None = None, on_upload: TamperUpload | None = None
) -> tuple[stand_in.VectorLearner, Line, str]:
    """One federation with one tampered line; returns the victim, the line, and the operator's message."""
    answers = _Answers()
    logger = logging.getLogger("fedmosaic.client.round.session")
    logger.addHandler(answers)
    try:
        with stand_in.founded() as (directory, coordinator):
            line = Line(coordinator, on_aggregate, on_upload)

            def transport_of(name: str) -> InProcessTransport:
                return line if name == _VICTIM else InProcessTransport(coordinator, name, 60.0)

            learners, errors = stand_in.run_sessions(directory, transport_of)
    finally:
        logger.removeHandler(answers)
    return learners[_VICTIM], line, "; ".join([*answers.lines, *errors])
