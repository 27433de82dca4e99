"""The ledger of one data set: what was released from it, what that cost, and what may still be released.

    sum, clipped  →  reserve()  →  draw noise  →  store the noisy bytes  →  released()  →  send

`reserve` charges, durably, before any noise exists. A crash after it wastes budget and forgets none. Sending
stored bytes again is `resent` and free. The budget is a filter, fixed when the ledger is opened for the first
time: a release that would pass the target ε is refused before noise is drawn.

Whoever can write the ledger *and* its head file can rewrite both; an `anchor` kept elsewhere finds that too.
ε adds up over every client, run and federation that releases from the data, so they share one ledger, in a
directory of its own (`LEDGER`), with the noised profiles that may be sent again.
"""

import datetime as dt
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmosaic.privacy.accounting.epsilon import EpsilonBound, check_delta
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.ledger import rules
from fedmosaic.privacy.ledger.rows import (
    CHANNELS,
    Channel,
    Charge,
    Coverage,
    Kind,
    LedgerRow,
    Unit,
    canonical_json,
    charges,
    data_epoch,
    epoch_of_hashes,
    example_hashes,
)
from fedmosaic.privacy.ledger.rules import LedgerParameters, Release, check_anchor, parameters_of
from fedmosaic.privacy.ledger.store import LedgerLog, LedgerStore, has_begun, read_ledger
from fedmosaic.protos.errors import BudgetExceededError, LedgerError

__all__ = ["LEDGER", "Ledger", "LedgerParameters", "data_epoch", "has_begun", "parameters_of", "read_ledger"]

LEDGER = "ledger.sqlite"
"""Name of the file in its directory."""


class Ledger:
    """An open ledger, for several threads and processes: every append excludes all others."""

    def __init__(self, log: LedgerLog, parameters: LedgerParameters) -> None:
        self.parameters = parameters
        self._log = log

    @classmethod
    def open(
        cls,
        path: Path,
        client_id: str,
        delta: float,
        target_epsilon: float | None,
        accountant: str = "prv",
        *,
        budgeted_channels: Sequence[Channel] = CHANNELS,
        examples: int | None = None,
        unit: Unit = "example",
        clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> "Ledger":
        """Open or create a ledger, and verify it.

        Args:
            path: the SQLite file; `<path>.head` stands beside it.
            client_id: who releases now; the data's releases under another name are charged here as well.
            delta: δ in (0, 1/n] of every ε in the ledger.
            target_epsilon: budget for all budgeted channels together; None records without refusing.
            accountant: "prv" (default), "rdp" or "pld".
            budgeted_channels: which channels the budget bounds. One whose releases are not differentially
                private costs ε = ∞ and must be left out here by name, or nothing can be released on it.
            examples: n, the client's number of units; checked against δ, not stored.
            unit: what is added or removed: all releases of a ledger protect the same.
            clock: tells the time.

        Raises:
            LedgerError: the ledger is damaged or closed, or was opened first with other parameters.
            AccountingError: δ (above 1/n, for one) or the accountant is not acceptable.
        """
        parameters = LedgerParameters(
            client_id, float(delta), target_epsilon, accountant, tuple(budgeted_channels), unit
        )
        if examples is not None:
            check_delta(delta, examples)
        store = LedgerStore(path)
        try:
            log = LedgerLog(store, clock)
            with store.transaction():
                if store.prepare():
                    opening = parameters.canonical(secrets.token_hex(32))
                    log.append("OPENED", bound=EpsilonBound(0.0, accountant), mechanism=opening, unit=unit)
            log.verify()
            rules.check_open(log.rows)
            rules.check_parameters(parameters, log.rows)
            store.keep_head(log.rows[-1].sequence)
        except BaseException:
            store.close()
            raise
        return cls(log, parameters)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._log.store.close()

    def tell(self, listener: Callable[[LedgerRow], None]) -> None:
        """Call `listener` with every row that is appended here from now on, once it is durable."""
        self._log.told = listener

    def reserve(
        self,
        channel: Channel,
        round: int,
        event: GaussianEvent,
        *,
        data_epoch: str,
        secure_noise: bool,
        mechanism: Mapping[str, Any] | None = None,
        clipping_norm: float | None = None,
        dimensions: int | None = None,
        covered_by: Coverage = "dp",
        example_ids: Iterable[str] | None = None,
        context: str = "",
    ) -> int:
        """Charge one release, durably, before its noise is drawn; the sequence of its RESERVED row.

        Args:
            channel: what is released.
            round: of the federation.
            event: (σ, q, steps) of the whole release; `UNPROTECTED` when covered_by is not "dp".
            data_epoch: `data_epoch(ids)` of the examples that it may depend on.
            secure_noise: False when the noise comes from a test's seeded generator.
            mechanism: plain JSON that describes the mechanism.
            clipping_norm: C, required for "dp".
            dimensions: length of the released vector, required for "dp".
            covered_by: "dp", or, with ε = ∞, "cryptography" or "nothing".
            example_ids: the epoch's example ids, to have it composed in parallel with other epochs that were
                given so; the ledger proves that they share none.
            context: the run, or for a profile its mechanism: another one makes another release, charged too.

        Raises:
            BudgetExceededError: the release would pass the target ε; recorded as REFUSED, nothing charged.
            LedgerError: the release was made already (send the stored bytes), the epochs overlap, or the
                arguments contradict each other.
        """
        fields: dict[str, Any] = {
            "channel": channel,
            "round": round,
            "context": context,
            "mechanism": canonical_json(dict(mechanism or {})),
            "noise_multiplier": event.noise_multiplier,
            "sampling_rate": event.sampling_rate,
            "steps": event.steps,
            "clipping_norm": clipping_norm,
            "dimensions": dimensions,
            "covered_by": covered_by,
            "secure_noise": secure_noise,
            "data_epoch": data_epoch,
            "disjoint": example_ids is not None,
            "unit": self.parameters.unit,
        }
        rules.check_request(fields, event)
        hashes = None if example_ids is None else example_hashes(example_ids)
        release = Release(channel, round, data_epoch, context)
        with self._log.appending() as rows:
            done = release.made(rows)
            if done is not None:
                raise LedgerError(
                    f"this {channel} release was made already (reservation {done.reference}, bytes "
                    f"{(done.payload_digest or '')[:12]}…): send the stored bytes again, which costs "
                    "nothing; a fresh draw from the same data would be a new release"
                )
            if hashes is not None:
                self._prove_disjoint(data_epoch, hashes)
            fields["attempt"] = 1 + len(release.among(rows, "RESERVED"))
            bound = self._bound_after(rows, channel, event, None if hashes is None else data_epoch)
            target = self.parameters.target_epsilon
            # Written so that NaN is refused, too.
            within = target is None or bound.epsilon <= target
            refused = channel in self.parameters.budgeted_channels and not within
            if hashes is not None and not refused:
                self._log.store.keep_examples(data_epoch, hashes)
            row = self._log.append("REFUSED" if refused else "RESERVED", bound=bound, **fields)
        if refused:
            raise BudgetExceededError(
                f"client {self.parameters.client_id!r}: this {channel} release would bring ε to "
                f"{bound.epsilon:.4g} (δ = {self.parameters.delta:g}), above the target {target:g}; no "
                f"noise was drawn and nothing was charged. {rules.advice(event)}"
            )
        return row.sequence

    def released(self, sequence: int, digest: str) -> None:
        """Record that the noisy bytes of a reservation are stored and may be sent; no others ever may."""
        with self._log.appending() as rows:
            reservation = rules.reservation_at(rows, sequence)
            before = Release.of(reservation).made(rows)
            if before is not None and (before.reference, before.payload_digest) == (sequence, digest):
                return
            if before is not None:
                raise LedgerError(
                    f"the release of reservation {sequence} is recorded with other bytes (reservation "
                    f"{before.reference}); only the bytes of that record may be sent"
                )
            self._append_about(reservation, "RELEASED", digest, reservation.attempt, reservation.round)

    def resent(self, sequence: int, digest: str, round: int | None = None) -> None:
        """Record that the released bytes, and no others, were sent once more in a round; costs nothing."""
        with self._log.appending() as rows:
            reservation = rules.reservation_at(rows, sequence)
            sent = [r for r in rows if r.reference == sequence and r.kind in ("RELEASED", "RESENT")]
            if not sent:
                raise LedgerError(f"nothing was released for reservation {sequence}; call released() first")
            if sent[0].payload_digest != digest:
                raise LedgerError(
                    f"these are not the bytes released for reservation {sequence}: a fresh draw is a new "
                    "release and must be reserved first; send the stored bytes"
                )
            in_round = reservation.round if round is None else round
            self._append_about(reservation, "RESENT", digest, len(sent) + 1, in_round)

    def release_of(
        self, channel: Channel, round: int, data_epoch: str, context: str = ""
    ) -> LedgerRow | None:
        """The RELEASED row whose stored bytes are to be sent; a profile's round does not matter."""
        with self._log.reading() as rows:
            return Release(channel, round, data_epoch, context).made(rows)

    def refused(self, channel: Channel, round: int, data_epoch: str, context: str = "") -> bool:
        """Whether the budget refused this release when it was asked for last.

        A reservation before that is of a draw that was lost.
        """
        release = Release(channel, round, data_epoch, context)
        with self._log.reading() as rows:
            asked = release.among(rows, "RESERVED")[-1:] + release.among(rows, "REFUSED")[-1:]
            return max((row.sequence, row.kind) for row in asked)[1] == "REFUSED" if asked else False

    def pending(self, channel: Channel, round: int, data_epoch: str, context: str = "") -> LedgerRow | None:
        """The last reservation of a release that was never recorded as made, such as after a crash.

        If its noisy bytes were stored, `released` may still be called for it; if not, they are to be drawn
        anew under a new reservation.
        """
        release = Release(channel, round, data_epoch, context)
        with self._log.reading() as rows:
            if release.made(rows) is not None:
                return None
            return next(reversed(release.among(rows, "RESERVED")), None)

    def events(self, channel: Channel | None = None) -> list[GaussianEvent]:
        """Every charged event, of one channel or of all, released or not."""
        return [charge.event for charge in charges(self.export(), channel and (channel,))]

    def epsilon(self, channel: Channel | None = None) -> float:
        """ε at the ledger's δ of one channel alone, or of all channels together (not only the budgeted)."""
        charged = charges(self.export(), channel and (channel,))
        return rules.bound_of(charged, self.parameters.delta, self.parameters.accountant).epsilon

    @property
    def directory(self) -> Path:
        """Where the ledger stands, and what belongs to it."""
        return self._log.store.path.parent

    def anchor(self, keeper: str) -> bytes:
        """What a keeper may have (32 bytes) to find a ledger put back from an older copy; see `anchor_of`."""
        return rules.anchor_of(self.export(), keeper)

    def check_anchor(self, keeper: str, anchor: bytes, source: str) -> None:
        """Refuse to be behind an anchor; see `rules.check_anchor`."""
        check_anchor(self.export(), keeper, anchor, source)

    def verify(self) -> None:
        """Read everything again and check it against itself and the head file; LedgerError as at opening."""
        self._log.verify()

    def export(self) -> list[LedgerRow]:
        """All rows in order. They hold data epochs and the salt: for this machine, not for sending."""
        with self._log.reading() as rows:
            return list(rows)

    def _append_about(
        self, reservation: LedgerRow, kind: Kind, digest: str, attempt: int | None, round: int | None
    ) -> None:
        self._log.append(
            kind,
            bound=self._log.running_bound(),
            unit=reservation.unit,
            channel=reservation.channel,
            round=round,
            context=reservation.context,
            attempt=attempt,
            reference=reservation.sequence,
            data_epoch=reservation.data_epoch,
            payload_digest=digest,
        )

    def _bound_after(
        self, rows: Sequence[LedgerRow], channel: Channel, event: GaussianEvent, disjoint_epoch: str | None
    ) -> EpsilonBound:
        charged = charges(rows, self.parameters.budgeted_channels)
        if channel in self.parameters.budgeted_channels:
            charged.append(Charge(event, disjoint_epoch))
        return rules.bound_of(charged, self.parameters.delta, self.parameters.accountant)

    def _prove_disjoint(self, epoch: str, hashes: list[str]) -> None:
        if epoch_of_hashes(hashes) != epoch:
            raise LedgerError("these example ids are not those of this data epoch; see data_epoch()")
        check_delta(self.parameters.delta, len(hashes))
        if self._log.store.overlaps(epoch, hashes):
            raise LedgerError(
                "an example of this data epoch is also in an earlier one; they do not compose in parallel: "
                "leave out the examples that were used, or reserve without example_ids and pay for both"
            )
