"""A client's standing with the server: enrolment, sampling, the group key, and a server behind what it said.

A server may be put back to an older copy of its state: it then asks again for uploads that it has
acknowledged, keeps an older head of the privacy ledger, or knows a key epoch no more. None of that makes a
client release or charge anything anew: the stored bytes are sent again, or sealed again under another key.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from fedmosaic import __version__
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.protection import Identity, Protection
from fedmosaic.client.round.records import read_upload, write_upload
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.state import OLDER_COPY, ClientState, contradicts
from fedmosaic.client.transport.grpc import Transport
from fedmosaic.privacy.federation.kits import Kit, open_kit
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.protos.errors import KeyAgreementError, KeyExpiredError, PolicyError, StateError
from fedmosaic.protos.messages import (
    PROTOCOL_VERSION,
    Aggregate,
    Enrolled,
    Enrolment,
    Phase,
    Receipt,
    RoundStatus,
    Upload,
)
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.signing import ledger_digest

log = logging.getLogger(__name__)
KEY_REASONS: Final = frozenset(
    {"KEY_EPOCH_REPLACED", "KEY_EPOCH_CLOSED", "NOT_IN_KEY_EPOCH", "KEY_NOT_AGREED"}
)
"""Reasons of refusals that the next key epoch may cure."""
ROSTER_REASONS: Final = frozenset({"ROSTER_CHANGED", "ROSTER_DIFFERS", "WRONG_CERTIFICATE"})
"""Reasons of refusals, in the middle of a run, that the newest roster may cure, here or at the server."""
_WAITING_FOR_A_TURN: Final = "waiting for a round that it takes part in"
_SECONDS_BETWEEN_LOOKS: Final = 1.0
_SECONDS_BETWEEN_EPOCHS: Final = 2.0
_SENT_AGAIN: Final = 3
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

    The ledger's head, for the server to keep, is signed over `fedmosaic.protos.signing.ledger_digest`.

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


class SealAnewError(Exception):
    """The key epoch of an upload is over: its round is taken part in again, with the trained adapter."""

    def __init__(self, upload: Upload) -> None:
        super().__init__(f"round {upload.round}")
        self.round = upload.round


class _KeyAwaitedError(Exception):
    """In an open round that this member was not drawn for, the others wait for it to agree on a key."""

    def __init__(self, round_number: int) -> None:
        super().__init__(f"round {round_number}")
        self.round = round_number


@dataclass(eq=False)
class Membership:
    """A member's standing with the server; `roster` is the newest that was taken up."""

    _kit: Kit
    _identity: Identity
    _transport: Transport
    _learner: Learner
    _state: ClientState
    _releases: Releases
    _protection: Protection
    _progress: Progress

    def __post_init__(self) -> None:
        self.roster = self._kit.roster
        self._sent_again: list[int] = []
        self._noted_key_epoch = 0

    def _enrol(self) -> Enrolled:
        """Enrol with the head of the privacy ledger; LedgerError if the server has kept a later one."""
        head, client_id = self._releases.anchor.head(), self._identity.client_id
        signed = ledger_digest(federation=self.roster.federation, client_id=client_id, head=head)
        enrolled = ask_to_enrol(
            self._transport,
            self.roster,
            self._learner.adapter_spec_hash,
            self._learner.family,
            ledger_head=head,
            ledger_signature=self._identity.signing_key.sign(signed),
        )
        self._releases.anchor.check(enrolled.ledger_head)
        where = {"run": enrolled.run_id, "round": enrolled.round}
        self._state.audit.add("enrolled", client=client_id, **where)
        return enrolled

    def _renewed(self, refusal: Refusal) -> Enrolled:
        """Wait until kit and server have the same roster again, take it up, and enrol under it.

        RefusedError if they had not, for as long as a round lasts; IdentityError if the new roster cannot
        follow on the present one, or does not name this client.
        """
        patience = self.roster.terms.schedule.round_deadline_seconds
        deadline = time.monotonic() + patience
        log.warning("%s; waiting for it, %.0f s at most", refusal, patience)
        while True:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            kit = open_kit(self._kit.directory)
            if kit.roster.hash != self.roster.hash:
                identity = Identity.of(kit)
                self._state.follow_roster(kit.roster)
                before, after = self.roster.hash.hex(), kit.roster.hash.hex()
                self._state.audit.add("roster", before=before, after=after)
                self._identity, self.roster = identity, kit.roster
                self._protection.renew(identity, kit.roster)
                log.warning("going on under roster %d", kit.roster.serial)
            try:
                return self._enrol()
            except Refusal as again:
                if again.reason not in ROSTER_REASONS or time.monotonic() > deadline:
                    raise

    def _drawn(self, number: int) -> frozenset[str]:
        return self.roster.taking_part(self._state.record.run_id, number)

    def _is_ours(self, number: int) -> bool:
        last = self.roster.terms.schedule.rounds
        return number <= last and self._identity.client_id in self._drawn(number)

    def _takes_part(self, number: int) -> bool:
        """Whether this client takes part in a round; if others were drawn, it waits for one of its own."""
        if not (ours := self._is_ours(number)) and number <= self.roster.terms.schedule.rounds:
            log.info("round %d: others were drawn to take part in it", number)
            self._progress.stage(number, _WAITING_FOR_A_TURN)
        return ours

    def _pull(self, round_number: int) -> Aggregate:
        """What there is to load before a round, once it is open.

        In rounds before it, for which others were drawn, this member agrees with them on every new key: it
        will have to open what they encrypt.
        """
        while True:
            try:
                aggregate = self._transport.pull(round_number, self._waiting)
                break
            except _KeyAwaitedError as awaited:
                self._agree_with_those_drawn(awaited.round)
        return self._seen(aggregate, round_number)

    def _agree_with_those_drawn(self, round_number: int) -> None:
        """Take part in a key agreement once; the server says again if it still waits."""
        aggregate = self._seen(self._transport.pull(round_number), round_number)
        epoch = aggregate.upload_key_epoch
        held = epoch == self._noted_key_epoch
        self._progress.stage(aggregate.round, "agreeing on the group key")
        error = self._try_to_agree(aggregate)
        self._progress.stage(aggregate.round, _WAITING_FOR_A_TURN)
        if error is not None:
            log.warning("key epoch %d: %s", epoch, error)
        if error is not None or held:  # a server that asks for what is done may ask at once again
            time.sleep(_SECONDS_BETWEEN_EPOCHS)

    def _seen(self, aggregate: Aggregate, round_number: int) -> Aggregate:
        if aggregate.round < round_number:
            raise StateError(
                f"the server opened round {aggregate.round} where round {round_number} was due: a round "
                "that is over is never encrypted again; restore the server's state, or begin a new run"
            )
        self._state.see(aggregate.round, aggregate.head)
        return aggregate

    def _try_to_agree(self, aggregate: Aggregate) -> KeyAgreementError | Refusal | None:
        """Agree on the group key of an open round's uploads; what the next key epoch may cure is returned."""
        epoch = aggregate.upload_key_epoch
        try:
            members = self._protection.ready(epoch, aggregate.round)
        except (KeyAgreementError, Refusal) as error:
            if isinstance(error, Refusal) and error.reason not in KEY_REASONS:
                raise
            return error
        if members and epoch != self._noted_key_epoch:
            self._state.audit.add("key-epoch", epoch=epoch, members=members)
            self._noted_key_epoch = epoch
        return None

    def _agree(self, aggregate: Aggregate) -> Aggregate:
        """Agree on the group key of this round's uploads; on failure, wait for the next key epoch.

        That may be in a later round, also in one for which others were drawn. KeyExpiredError if the server
        has kept a key in use that the roster's terms have ended.
        """
        patience = time.monotonic() + self.roster.terms.schedule.key_patience_seconds
        told, tried = "", -1
        while self._is_ours(aggregate.round):
            epoch = aggregate.upload_key_epoch
            if epoch != tried and self.roster.terms.adapter.encrypted:
                # Said once: in between, the next one may be a whole round away.
                self._progress.stage(aggregate.round, "agreeing on the group key")
            tried = epoch
            error = self._try_to_agree(aggregate)
            if error is None:
                return aggregate
            if isinstance(error, KeyExpiredError) and time.monotonic() > patience:
                raise error
            if str(error) != told:
                log.warning("key epoch %d: %s", epoch, error)
                self._progress.stage(aggregate.round, "waiting for the next key epoch")
            told = str(error)
            time.sleep(_SECONDS_BETWEEN_EPOCHS)
            aggregate = self._pull(aggregate.round)
        return aggregate

    def _as_ours(self, run_id: str, upload: Upload) -> Upload:
        """A stored upload; the same bytes signed again if our identity key has changed since."""
        again = self._protection.signed(run_id, upload, upload.ledger)
        if again.signature != upload.signature:  # Ed25519 signs alike every time
            log.warning("round %d: the stored upload is signed again, with the new key", upload.round)
            write_upload(self._state.upload_path(upload.round), again)
        return again

    def _waiting(self, status: RoundStatus) -> None:
        """Told now and then what the server waits for: sees whether it is still the server we know.

        StateError if it is an older copy, or one with another past; SealAnewError if it has lost an upload,
        and the key epoch of its bytes as well; _KeyAwaitedError if it waits for this member's part in an
        agreement.
        """
        self._progress.waiting(status)
        if self._key_awaited(status):
            raise _KeyAwaitedError(status.round)
        if contradicts(self._state.record, status.round, status.head) or self._wanted_again(status):
            # It may have waited in a buffer since before another answer, so it alone proves nothing.
            status = self._compare()
            if self._wanted_again(status):
                self._send_again(status.round)

    def _key_awaited(self, status: RoundStatus) -> bool:
        """Whether the server waits for this member in a round in which it uploads nothing."""
        me, encrypted = self._identity.client_id, self.roster.terms.adapter.encrypted
        waited_for = status.phase is Phase.OPEN and me in status.waiting_for
        return encrypted and waited_for and me not in self._drawn(status.round)

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
        self._sent_again.append(round_number)
        upload = None
        try:
            upload = read_upload(self._state.upload_path(round_number))
            if upload is None:
                return
            log.warning("round %d: the server has lost our upload; sending it again as it was", round_number)
            self._transport.push(self._as_ours(self._state.record.run_id, upload))
        except (StateError, Refusal) as error:
            log.warning("round %d: the upload was not taken again: %s", round_number, error)
            if upload is not None and isinstance(error, Refusal) and error.reason in KEY_REASONS:
                raise self._retired(upload) from None

    def _after_refusal(self, upload: Upload, refusal: Refusal) -> tuple[Upload, Receipt]:
        """What can still be done about an upload that was refused: as it was taken, and the receipt.

        Raises:
            SealAnewError: its key epoch is over.
            LedgerError: our ledger does not hold what the server keeps of it.
            StateError: this client's state, or the server's, is an older copy.
            RefusedError: nothing can be done.
        """
        self._state.audit.refused(self._identity.client_id, "push", refusal.reason)
        if refusal.reason == "LEDGER_BEHIND":
            # The server may have been put back to a moment before; whoever is behind is the ledger's to find.
            self._enrol()
            claim = self._releases.anchor.claim()
            upload = self._protection.signed(self._state.record.run_id, upload, claim)
            write_upload(self._state.upload_path(upload.round), upload)
            try:
                return upload, self._transport.push(upload)
            except Refusal as again:
                refusal = again
        if refusal.reason == "ROUND_NOT_OPEN":
            self._compare()
        if refusal.reason == "UPLOAD_DIFFERS":
            raise StateError(f"{refusal.message}; {self._state.directory} {OLDER_COPY}") from None
        if refusal.reason in KEY_REASONS:
            log.warning("round %d: %s; the adapter is sealed anew", upload.round, refusal)
            raise self._retired(upload) from None
        raise refusal

    def _retired(self, upload: Upload) -> SealAnewError:
        """Nothing is sealed under its key epoch any more."""
        self._protection.retire(upload.key_epoch)
        self._state.reopen_round(upload.round)
        if upload.profile is not None:
            self._releases.profile_lost()
        return SealAnewError(upload)
