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
from collections.abc import Mapping

import numpy as np

from fedmosaic.client.round.membership import ROSTER_REASONS, Membership, SealAnewError
from fedmosaic.client.round.records import read_upload, write_upload
from fedmosaic.privacy.policy import check_row
from fedmosaic.protos.errors import EncryptionError, PolicyError
from fedmosaic.protos.messages import Aggregate, AggregateSection, Enrolled, ReceiptStatus, Upload
from fedmosaic.protos.refusal import Refusal

log = logging.getLogger(__name__)


class Session(Membership):
    """One client in one run, from enrolment to the last round."""

    def run(self) -> None:
        """Take part until the run is finished.

        Raises:
            RefusedError: the server refuses this client; the reason and the remedy are in the message.
            IdentityError: the roster, at the start or a new one, is older or has other terms than before.
            LedgerError: the privacy ledger is behind what the server has kept of it.
            PolicyError: the server wants another number of rounds than the roster's terms.
            StateError: the state here is of another run, or the server's is an older copy.
            TransportError: the server cannot be reached for longer than the transport's patience.
        """
        try:
            self._run()
        except Refusal as refusal:
            self._state.audit.refused(self._identity.client_id, "run", refusal.reason)
            raise

    def _run(self) -> None:
        self._state.follow_roster(self.roster)
        enrolled = self._enrol()
        self._state.join_run(enrolled.run_id)
        round_number = self._resume(enrolled)
        while round_number <= enrolled.rounds:
            try:
                round_number = self._take_part(enrolled, round_number)
            except SealAnewError as again:
                round_number = again.round
            except Refusal as refusal:
                if refusal.reason not in ROSTER_REASONS:
                    raise
                enrolled = self._renewed(refusal)
                round_number = self._resume(enrolled)
        self._after_last_round(enrolled)
        self._state.forget_uploads(enrolled.rounds + 1)
        # Last, so that a crash before it leaves keys that the next start deletes, and never too few.
        self._protection.forget_keys()

    def _after_last_round(self, enrolled: Enrolled) -> None:
        """What is left to do once all rounds are over."""

    def _resume(self, enrolled: Enrolled) -> int:
        """Go on from disk. Returns the round to take part in.

        That is the round of an upload that nobody acknowledged, if there is one, even if it is over: the
        server may have taken it, and only its answer tells.
        """
        self._state.see(enrolled.round, enrolled.head)
        newest = self._state.latest_adapter()
        if newest is not None:
            self._learner.load(newest[1])
            log.info("resumed after round %d", newest[0])
        completed = self._state.record.completed_round
        return self._state.unacknowledged_round() or max(enrolled.round, completed + 1)

    def _take_part(self, enrolled: Enrolled, round_number: int) -> int:
        """One round. Returns the number of the next round to take part in."""
        upload = read_upload(self._state.upload_path(round_number))
        if upload is not None:
            log.info("round %d: re-sending the stored upload, byte for byte", round_number)
            self._load_trained(round_number)
            return self._push(self._as_ours(enrolled.run_id, upload))
        if not self._takes_part(round_number):
            return round_number + 1
        self._progress.stage(round_number, "waiting for the round to open")
        aggregate = self._pull(round_number)
        if aggregate.round > round_number:
            log.warning("round %d closed without us; going on with round %d", round_number, aggregate.round)
        aggregate = self._agree(aggregate)
        if not self._takes_part(aggregate.round):
            return aggregate.round + 1
        self._contribute(enrolled.run_id, aggregate)
        upload = self._seal(enrolled.run_id, aggregate)
        write_upload(self._state.upload_path(aggregate.round), upload)
        return self._push(upload)

    def _contribute(self, run_id: str, aggregate: Aggregate) -> None:
        """What a round does before its upload."""
        self._receive(aggregate)
        self._train(aggregate.round)

    def _vectors(self, round_number: int) -> Mapping[str, np.ndarray]:
        """What of the adapter leaves with an upload, booked."""
        self._progress.stage(round_number, "protecting the adapter")
        return self._releases.adapter(round_number, self._learner.sections())

    def _receive(self, aggregate: Aggregate) -> None:
        self._progress.stage(aggregate.round, "receiving the aggregate")
        received = False
        for name, vector in self._learner.sections().items():
            section = next((s for s in aggregate.sections if s.name == name), None)
            outcome = "taken"
            try:
                if aggregate.round == 1:
                    raise PolicyError("nothing was shared before round 2")
                if section is None:
                    raise PolicyError("the server gave no reason")
                if self._state.gave_up(aggregate.round):
                    raise PolicyError("training failed with it before the restart")
                self._learner.load_global(name, self._open(section, aggregate, vector.size))
                received = True
            except (PolicyError, EncryptionError) as error:
                # The recipient trains alone this round; the reason is for its operator, and stays here.
                if aggregate.round > 1:
                    log.warning("round %d: no %s aggregate: %s", aggregate.round, name, error)
                outcome = type(error).__name__
                self._learner.keep_own(name)
            if aggregate.round > 1:
                # Taken or not, a line is written: what is seen of the time that it takes tells nothing.
                self._state.audit.add("received", round=aggregate.round, section=name, outcome=outcome)
        self._state.note_received(aggregate.round, received=received)

    def _open(self, section: AggregateSection, aggregate: Aggregate, size: int) -> np.ndarray:
        """Check a section's weight row, remember it as the only one of its round, and decrypt."""
        row, uploaded = section.row, aggregate.round - 1
        if row is None:
            raise PolicyError(section.refusal)
        run, epoch, recipient = self._state.record.run_id, aggregate.key_epoch, self._identity.client_id
        families = self.roster.sharing_families(section.name)
        check_row(recipient, row, self.roster.terms.policy, members=families, families=families)
        if away := sorted(set(row.contributors) - self._drawn(uploaded)):
            raise PolicyError(
                f"weight row names {', '.join(away)}, who took no part in round {uploaded}: others were drawn"
            )
        self._protection.check_countersigned(run, section, row, epoch, uploaded)
        self._state.accept_row(section.name, uploaded, row)
        return self._protection.open(section, row, epoch, uploaded, size)

    def _train(self, round_number: int) -> None:
        if self._load_trained(round_number):
            log.info("round %d: training was finished before the restart", round_number)
            return

        def give_up() -> None:
            # Private data decide whether the personal part can be trained. Remembered over a restart, that
            # would decide, without noise, with which received branch DP-SGD runs.
            if not self.roster.terms.adapter.private:
                self._state.give_up(round_number)

        self._learner.train(round_number, self._releases, give_up)
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
        vectors, claim = self._vectors(aggregate.round), self._releases.anchor.claim()
        number, epoch = aggregate.round, aggregate.upload_key_epoch
        return self._protection.seal(run_id, number, epoch, vectors, profile, claim)

    def _push(self, upload: Upload) -> int:
        """Send an upload. Returns the number of the next round to take part in."""
        self._progress.stage(upload.round, "sending")
        try:
            receipt = self._transport.push(upload)
        except Refusal as refusal:
            upload, receipt = self._after_refusal(upload, refusal)
        self._state.see(receipt.round, receipt.head)
        if receipt.status is ReceiptStatus.LATE:
            log.warning("round %d closed before our upload arrived; it was not used", upload.round)
        else:
            self._releases.anchor.accepted(upload.ledger)
            if upload.profile is not None:
                self._releases.profile_acknowledged()
        self._state.complete_round(upload.round, self._learner.save)
        return max(upload.round + 1, receipt.round)
