"""One client's life over the rounds, written against a transport and a learner.

    pull      the aggregate the server made of the last round's uploads, and this round's key epoch
    receive   check the weight row against the policy, decrypt, load into the global branch
    train     the local branch (under DP: the shared branch privately first, the personal one on top)
    profile   release the task profile, once per data epoch
    push      the protected adapter and the profile; after any failure, the same bytes again

Nothing that the server can see depends on what was decrypted: an aggregate that cannot be opened, or cannot
be trained with, is left out, the reason stays at home, and the calls to the transport are those of any round.

Everything that a crash could lose is on disk before the next step depends on it.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from fedmosaic import __version__
from fedmosaic.client.outbox import read_upload, write_upload
from fedmosaic.client.progress import Progress
from fedmosaic.client.protection import Identity, Protection
from fedmosaic.client.releases import Releases
from fedmosaic.client.state import OLDER_COPY, ClientState
from fedmosaic.client.transport.grpc import Transport
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.policy import WeightRow, check_row
from fedmosaic.protos.errors import (
    EncryptionError,
    KeyAgreementError,
    KeyExpiredError,
    PolicyError,
    StateError,
)
from fedmosaic.protos.messages import (
    PROTOCOL_VERSION,
    Aggregate,
    AggregateSection,
    Enrolled,
    Enrolment,
    Phase,
    ReceiptStatus,
    RoundStatus,
    Upload,
)
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.signing import ledger_digest

log = logging.getLogger(__name__)

KEY_REASONS = frozenset({"KEY_EPOCH_REPLACED", "KEY_EPOCH_CLOSED", "NOT_IN_KEY_EPOCH", "KEY_NOT_AGREED"})
"""Reasons of refusals that the next key epoch may cure."""

_SECONDS_BETWEEN_EPOCHS = 2.0
_SENT_AGAIN = 3
"""How often a round's acknowledged upload is sent again when the server asks; more would be a fault of it."""


class Learner(Protocol):
    """What a session asks of the model side. The session never sees a model, an example or a gradient."""

    @property
    def adapter_spec_hash(self) -> bytes:
        """SHA-256 of the shared layout, equal for all members."""

    @property
    def family(self) -> str:
        """Architecture name for family sharing; empty if none."""

    def load_global(self, section: str, vector: np.ndarray) -> None:
        """Load an aggregate into the frozen global branch."""

    def keep_own(self, section: str) -> None:
        """No aggregate: the global branch becomes a copy of the local one (released code, §2.6 step 1)."""

    def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
        """Train for one round; under DP, charge through `releases` before any noise is drawn.

        Whatever was received, it ends, and takes the steps of any round. Where nothing can be trained beside
        what was received, it calls `give_up` and goes on as after `keep_own`.
        """

    def sections(self) -> Mapping[str, np.ndarray]:
        """What is shared now: section name → float32 vector."""

    def save(self, directory: Path) -> None:
        """Write every branch, the gate and the sampler's position."""

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""


class _SealAnewError(Exception):
    """The server has lost an upload that it acknowledged, and the key epoch of its bytes as well."""

    def __init__(self, upload: Upload) -> None:
        super().__init__(f"round {upload.round}")
        self.upload = upload


def ask_to_enrol(
    transport: Transport,
    roster: Roster,
    adapter_spec_hash: bytes,
    family: str,
    *,
    check_only: bool = False,
    ledger_head: bytes = b"",
    ledger_signature: bytes = b"",
) -> Enrolled:
    """Compare what both sides believe about the federation, and enrol unless it is to be checked only.

    Args:
        transport: way to the server.
        roster: this client's.
        adapter_spec_hash: SHA-256 of the shared layout.
        family: architecture name; empty if none.
        check_only: leave the server as it is; a model need not be loaded yet.
        ledger_head: anchor of this client's privacy ledger, for the server to keep; empty for none.
        ledger_signature: this client's, over `fedmosaic.protos.signing.ledger_digest`.

    Raises:
        RefusedError: the server refuses this client; the reason and the remedy are in the message.
        PolicyError: the server wants another number of rounds than the roster's terms.
        TransportError: the server cannot be reached for longer than the transport's patience.
    """
    enrolled = transport.enrol(
        Enrolment(
            protocol_version=PROTOCOL_VERSION,
            federation=roster.federation,
            roster_hash=roster.hash,
            adapter_spec_hash=adapter_spec_hash,
            family=family,
            software=f"fedmosaic {__version__}",
            check_only=check_only,
            ledger_head=ledger_head,
            ledger_signature=ledger_signature,
        )
    )
    agreed = roster.terms.schedule.rounds
    if enrolled.rounds != agreed:
        raise PolicyError(
            f"the server runs {enrolled.rounds} rounds, the signed terms say {agreed}; nothing was sent. "
            "Ask who runs the server: more rounds are more weight rows, from which recipients learn more"
        )
    return enrolled


class Session:
    """One client in one run, from enrolment to the last round."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        transport: Transport,
        learner: Learner,
        state: ClientState,
        releases: Releases,
        protection: Protection,
        progress: Progress,
    ) -> None:
        self._identity = identity
        self._roster = roster
        self._transport = transport
        self._learner = learner
        self._state = state
        self._releases = releases
        self._protection = protection
        self._progress = progress
        self._sent_again: list[int] = []

    def run(self) -> None:
        """Take part until the run is finished.

        Raises:
            RefusedError: the server refuses this client; the reason and the remedy are in the message.
            LedgerError: the privacy ledger is behind what the server has kept of it.
            PolicyError: the server wants another number of rounds than the roster's terms.
            StateError: the state here is of another run, or the server's is an older copy.
            TransportError: the server cannot be reached for longer than the transport's patience.
        """
        enrolled = self._enrol()
        self._state.join_run(enrolled.run_id)
        self._state.see(enrolled.round, enrolled.head)
        round_number = self._resume(enrolled.round)
        while round_number <= enrolled.rounds:
            round_number = self._take_part(enrolled, round_number)
        self._state.forget_uploads(enrolled.rounds + 1)
        # Last, so that a crash before it leaves keys that the next start deletes, and never too few.
        self._protection.forget_keys()

    def _enrol(self) -> Enrolled:
        head = self._releases.anchor.head()
        signed = ledger_digest(
            federation=self._roster.federation, client_id=self._identity.client_id, head=head
        )
        enrolled = ask_to_enrol(
            self._transport,
            self._roster,
            self._learner.adapter_spec_hash,
            self._learner.family,
            ledger_head=head,
            ledger_signature=self._identity.signing_key.sign(signed),
        )
        self._releases.anchor.check(enrolled.ledger_head)
        return enrolled

    def _resume(self, open_round: int) -> int:
        """Go on from disk. Returns the round to take part in.

        That is the round of an upload that nobody acknowledged, if there is one, even if it is over: the
        server may have taken it, and only its answer tells.
        """
        newest = self._state.latest_adapter()
        if newest is not None:
            self._learner.load(newest[1])
            log.info("resumed after round %d", newest[0])
        completed = self._state.record.completed_round
        return self._state.unacknowledged_round() or max(open_round, completed + 1)

    def _take_part(self, enrolled: Enrolled, round_number: int) -> int:
        """One round. Returns the number of the next round to take part in."""
        path = self._state.upload_path(round_number)
        upload = read_upload(path)
        if upload is not None:
            log.info("round %d: re-sending the stored upload, byte for byte", round_number)
            self._load_trained(round_number)
            return self._push(upload)
        self._progress.stage(round_number, "waiting for the round to open")
        try:
            aggregate = self._pull(round_number)
        except _SealAnewError as again:
            return self._retire(again.upload)
        if aggregate.round > round_number:
            log.warning("round %d closed without us; going on with round %d", round_number, aggregate.round)
        aggregate = self._agree(aggregate, enrolled.rounds)
        if aggregate.round > enrolled.rounds:
            return aggregate.round
        self._receive(aggregate)
        self._train(aggregate.round)
        upload = self._seal(enrolled.run_id, aggregate)
        write_upload(self._state.upload_path(aggregate.round), upload)
        return self._push(upload)

    def _pull(self, round_number: int) -> Aggregate:
        aggregate = self._transport.pull(round_number, self._waiting)
        if aggregate.round < round_number:
            raise StateError(
                f"the server opened round {aggregate.round} where round {round_number} was due: a round "
                "that is over is never encrypted again; restore the server's state, or begin a new run"
            )
        self._state.see(aggregate.round, aggregate.head)
        return aggregate

    def _waiting(self, status: RoundStatus) -> None:
        """Told now and then what the server waits for: sees whether it is still the server we know."""
        self._progress.waiting(status)
        if self._state.contradicts(status.round, status.head) or self._wanted_again(status):
            # It may have waited in a buffer since before another answer, so it alone proves nothing.
            status = self._compare()
            if self._wanted_again(status):
                self._send_again(status.round)

    def _compare(self) -> RoundStatus:
        """Ask the server where it is; StateError if that cannot be."""
        status = self._transport.status()
        self._state.see(status.round, status.head)
        return status

    def _wanted_again(self, status: RoundStatus) -> bool:
        """Whether the server waits for an upload that it has acknowledged."""
        done = self._state.record.completed_round
        waited_for = status.phase is Phase.OPEN and self._identity.client_id in status.waiting_for
        return waited_for and status.round == done and self._sent_again.count(done) < _SENT_AGAIN

    def _send_again(self, round_number: int) -> None:
        """The server has lost an upload that it acknowledged: the same bytes again, no new release."""
        self._sent_again.append(round_number)
        upload = None
        try:
            upload = read_upload(self._state.upload_path(round_number))
            if upload is None:
                return
            log.warning("round %d: the server has lost our upload; sending it again as it was", round_number)
            self._transport.push(upload)
        except (StateError, Refusal) as error:
            log.warning("round %d: the upload was not taken again: %s", round_number, error)
            if upload is not None and isinstance(error, Refusal) and error.reason in KEY_REASONS:
                raise _SealAnewError(upload) from None

    def _agree(self, aggregate: Aggregate, rounds: int) -> Aggregate:
        """Agree on the group key of this round's uploads; on failure, wait for the next key epoch.

        Raises:
            KeyExpiredError: the server has kept a key in use that the roster's terms have ended.
        """
        patience = time.monotonic() + self._roster.terms.schedule.key_patience_seconds
        told = ""
        while aggregate.round <= rounds:
            try:
                self._progress.stage(aggregate.round, "agreeing on the group key")
                self._protection.ready(aggregate.upload_key_epoch, aggregate.round)
                return aggregate
            except (KeyAgreementError, Refusal) as error:
                if isinstance(error, KeyExpiredError) and time.monotonic() > patience:
                    raise
                if isinstance(error, Refusal) and error.reason not in KEY_REASONS:
                    raise
                if str(error) != told:
                    log.warning("key epoch %d: %s", aggregate.upload_key_epoch, error)
                told = str(error)
            time.sleep(_SECONDS_BETWEEN_EPOCHS)
            aggregate = self._pull(aggregate.round)
        return aggregate

    def _receive(self, aggregate: Aggregate) -> None:
        self._progress.stage(aggregate.round, "receiving the aggregate")
        received = False
        for name, vector in self._learner.sections().items():
            section = next((s for s in aggregate.sections if s.name == name), None)
            try:
                if aggregate.round == 1:
                    raise PolicyError("nothing was shared before round 2")
                if section is None or section.row is None:
                    raise PolicyError((section and section.refusal) or "the server gave no reason")
                if self._state.gave_up(aggregate.round):
                    raise PolicyError("training failed with it before the restart")
                self._learner.load_global(name, self._open(section, aggregate, vector.size))
                received = True
            except (PolicyError, EncryptionError) as error:
                # The recipient trains alone this round; the reason is for its operator, and stays here.
                if aggregate.round > 1:
                    log.warning("round %d: no %s aggregate: %s", aggregate.round, name, error)
                self._learner.keep_own(name)
        self._state.note_received(aggregate.round, received=received)

    def _open(self, section: AggregateSection, aggregate: Aggregate, size: int) -> np.ndarray:
        weights = section.row
        if weights is None:
            raise PolicyError(section.refusal)
        row = WeightRow(
            round=aggregate.round - 1,
            recipient=self._identity.client_id,
            contributors=weights.contributors,
            weights=weights.weights,
            bits=weights.bits,
        )
        check_row(
            self._identity.client_id,
            row,
            self._roster.terms.policy,
            members=self._roster.identity_keys().keys(),
            round_number=aggregate.round - 1,
        )
        if section.name == "family":
            kin = {member.id for member in self._roster.members if member.family == self._learner.family}
            strangers = sorted(set(row.contributors) - kin)
            if strangers:
                family, named = self._learner.family, ", ".join(strangers)
                raise PolicyError(f"weight row of family {family!r} names members of others: {named}")
        self._state.accept_row(section.name, row)
        return self._protection.open(section, row, aggregate.key_epoch, size)

    def _train(self, round_number: int) -> None:
        if self._load_trained(round_number):
            log.info("round %d: training was finished before the restart", round_number)
            return
        self._learner.train(round_number, self._releases, lambda: self._state.give_up(round_number))
        self._state.save_adapter(round_number, self._learner.save)

    def _load_trained(self, round_number: int) -> bool:
        place = self._state.adapter_path(round_number)
        if not place.exists():
            return False
        self._learner.load(place)
        return True

    def _seal(self, run_id: str, aggregate: Aggregate) -> Upload:
        self._progress.stage(aggregate.round, "releasing the task profile", 100)
        profile = self._releases.profile(aggregate.round)
        self._progress.stage(aggregate.round, "protecting the adapter")
        vectors = self._releases.adapter(aggregate.round, self._learner.sections())
        claim = self._releases.anchor.claim()
        return self._protection.seal(
            run_id, aggregate.round, aggregate.upload_key_epoch, vectors, profile, claim
        )

    def _push(self, upload: Upload, *, checked: bool = False) -> int:
        self._progress.stage(upload.round, "sending")
        try:
            receipt = self._transport.push(upload)
        except Refusal as error:
            if error.reason == "LEDGER_BEHIND" and not checked:
                return self._push_as_checked(upload)
            if error.reason == "ROUND_NOT_OPEN":
                self._compare()
            if error.reason == "UPLOAD_DIFFERS":
                raise StateError(f"{error.message}; {self._state.directory} {OLDER_COPY}") from None
            if error.reason not in KEY_REASONS:
                raise
            log.warning("round %d: %s; the adapter is sealed anew", upload.round, error)
            return self._retire(upload)
        self._state.see(receipt.round, receipt.head)
        if receipt.status is ReceiptStatus.LATE:
            log.warning("round %d closed before our upload arrived; it was not used", upload.round)
        else:
            self._releases.anchor.accepted(upload.ledger)
            if upload.profile is not None:
                self._releases.profile_acknowledged()
        self._state.complete_round(upload.round, self._learner.save)
        return max(upload.round + 1, receipt.round)

    def _push_as_checked(self, upload: Upload) -> int:
        """Check the ledger against what the server keeps of it now, and send the same bytes with that.

        The server may have been put back to a moment before; whoever is behind is the ledger's own to find.

        Raises:
            LedgerError: our ledger does not hold what the server keeps.
        """
        self._enrol()
        claim = self._releases.anchor.claim()
        upload = self._protection.claim_anew(self._state.record.run_id, upload, claim)
        write_upload(self._state.upload_path(upload.round), upload)
        return self._push(upload, checked=True)

    def _retire(self, upload: Upload) -> int:
        """Nothing is sealed under its key epoch any more. Returns its round, to take part in with another."""
        self._protection.retire(upload.key_epoch)
        self._state.reopen_round(upload.round)
        return upload.round
