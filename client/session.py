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
from fedmosaic.client.state import ClientState
from fedmosaic.client.transport import Transport
from fedmosaic.privacy.policy import WeightRow, check_row
from fedmosaic.privacy.roster import Roster
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
    ReceiptStatus,
    Upload,
)
from fedmosaic.protos.refusal import Refusal

log = logging.getLogger(__name__)

KEY_REASONS = frozenset({"KEY_EPOCH_REPLACED", "KEY_EPOCH_CLOSED", "NOT_IN_KEY_EPOCH"})
"""Reasons of refusals that the next key epoch may cure."""

_SECONDS_BETWEEN_EPOCHS = 2.0


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

    def run(self) -> None:
        """Take part until the run is finished.

        Raises:
            RefusedError: the server refuses this client; the reason and the remedy are in the message.
            PolicyError: the server wants another number of rounds than the roster's terms.
            TransportError: the server cannot be reached for longer than the transport's patience.
        """
        enrolled = self._enrol()
        agreed = self._roster.terms.schedule.rounds
        if enrolled.rounds != agreed:
            raise PolicyError(
                f"the server runs {enrolled.rounds} rounds, the signed terms say {agreed}; nothing was sent. "
                "Ask who runs the server: more rounds are more weight rows, from which recipients learn more"
            )
        self._state.join_run(enrolled.run_id)
        self._resume()
        round_number = max(enrolled.round, self._state.record.completed_round + 1)
        while round_number <= enrolled.rounds:
            round_number = self._take_part(enrolled, round_number)
        # Last, so that a crash before it leaves keys that the next start deletes, and never too few.
        self._protection.forget_keys()

    def _enrol(self) -> Enrolled:
        return self._transport.enrol(
            Enrolment(
                protocol_version=PROTOCOL_VERSION,
                federation=self._roster.federation,
                roster_hash=self._roster.hash,
                adapter_spec_hash=self._learner.adapter_spec_hash,
                family=self._learner.family,
                software=f"fedmosaic {__version__}",
            )
        )

    def _resume(self) -> None:
        """Go on from disk: the adapter of the last completed round, and an upload nobody acknowledged."""
        adapter = self._state.latest_adapter()
        if adapter is not None:
            self._learner.load(adapter)
            log.info("resumed after round %d", self._state.record.completed_round)

    def _take_part(self, enrolled: Enrolled, round_number: int) -> int:
        """One round. Returns the number of the next round to take part in."""
        path = self._state.upload_path(round_number)
        upload = read_upload(path)
        if upload is not None:
            log.info("round %d: re-sending the stored upload, byte for byte", round_number)
            self._load_trained(round_number)
            return self._push(upload)
        self._progress.stage(round_number, "waiting for the round to open")
        aggregate = self._pull(round_number)
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
        aggregate = self._transport.pull(round_number, self._progress.waiting)
        if aggregate.round < round_number:
            raise StateError(
                f"the server opened round {aggregate.round} where round {round_number} was due: a round "
                "that is over is never encrypted again; restore the server's state, or begin a new run"
            )
        return aggregate

    def _agree(self, aggregate: Aggregate, rounds: int) -> Aggregate:
        """Agree on the group key of this round's uploads; on failure, wait for the next key epoch.

        Raises:
            KeyExpiredError: the server has kept a key in use that the roster's terms have ended.
        """
        patience = time.monotonic() + self._roster.terms.schedule.key_patience_seconds
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
                log.warning("key epoch %d: %s", aggregate.upload_key_epoch, error)
            time.sleep(_SECONDS_BETWEEN_EPOCHS)
            aggregate = self._pull(aggregate.round)
        return aggregate

    def _receive(self, aggregate: Aggregate) -> None:
        self._progress.stage(aggregate.round, "receiving the aggregate")
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
            except (PolicyError, EncryptionError) as error:
                # The recipient trains alone this round; the reason is for its operator, and stays here.
                if aggregate.round > 1:
                    log.warning("round %d: no %s aggregate: %s", aggregate.round, name, error)
                self._learner.keep_own(name)

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
        self._progress.stage(aggregate.round, "releasing the task profile")
        profile = self._releases.profile(aggregate.round)
        self._progress.stage(aggregate.round, "protecting the adapter")
        vectors = self._releases.adapter(aggregate.round, self._learner.sections())
        return self._protection.seal(run_id, aggregate.round, aggregate.upload_key_epoch, vectors, profile)

    def _push(self, upload: Upload) -> int:
        self._progress.stage(upload.round, "sending")
        try:
            receipt = self._transport.push(upload)
        except Refusal as error:
            if error.reason not in KEY_REASONS:
                raise
            log.warning("round %d: %s; the adapter is sealed anew", upload.round, error)
            self._protection.retire(upload.key_epoch)
            self._state.upload_path(upload.round).unlink(missing_ok=True)
            return upload.round
        late = receipt.status is ReceiptStatus.LATE
        if late:
            log.warning("round %d closed before our upload arrived; it was not used", upload.round)
        elif upload.profile is not None:
            self._releases.profile_acknowledged()
        self._state.complete_round(upload.round, self._learner.save)
        return max(upload.round + 1, receipt.round) if late else upload.round + 1
