"""The key epochs in the database: messages of the key agreement are stored before they count."""

import json
import logging
from collections.abc import Collection, Mapping

from fedmosaic.protos.errors import StateError
from fedmosaic.protos.messages import KeyMessage, UploadHeader
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.server.keys import epoch as epochs
from fedmosaic.server.keys.epoch import Answer, EpochPhase, KeyEpoch
from fedmosaic.server.settings import ServerSettings
from fedmosaic.server.storage.store import Store

log = logging.getLogger(__name__)
_KEY = "key_board"
_REASONS = {Answer.REPLACED: "KEY_EPOCH_REPLACED", Answer.NOT_A_MEMBER: "NOT_IN_KEY_EPOCH"}
_ENROL_AGAIN = "enrol again to learn the present key epoch, and take part in its agreement"


class KeyRelay:
    """Relays the messages of the present key epoch. Not thread-safe: the coordinator holds its lock."""

    def __init__(self, settings: ServerSettings, store: Store, now: float) -> None:
        """Go on with the stored epoch, or begin the first; `now` is in the clock of all later calls."""
        self._store = store
        patience, fewest = settings.terms.schedule.gathering_seconds, settings.minimum_epoch_members
        self._rotation = settings.terms.schedule.rotate_key_every
        self._boxed: tuple[int, frozenset[str]] = 0, frozenset()  # an epoch, and whose boxes are here
        self._resumed = 0
        stored = store.get_json(_KEY)
        if stored is None:
            self._present = epochs.first_epoch(now, patience, fewest)
            store.put(self.record(self._present))
        else:
            try:
                self._present = epochs.from_record(stored, now, patience, fewest)
                self._resumed = self._present.epoch  # whose boxes of before only the store knows
            except (KeyError, TypeError, ValueError, AttributeError):
                raise StateError(
                    "the server's database is damaged: its key epoch cannot be read; restore a backup of "
                    "state_dir and database together"
                ) from None

    @property
    def epoch(self) -> int:
        """Number of the present epoch."""
        return self._present.epoch

    @property
    def ready(self) -> bool:
        """Whether all members of the epoch have confirmed its key."""
        return self._present.phase is EpochPhase.READY

    @property
    def holders(self) -> frozenset[str]:
        """Members of the epoch but those who have lost its key; empty while they join."""
        return frozenset(self._present.members) - self._present.lost

    def due(self, round_number: int) -> bool:
        """Whether the epoch has served the rounds it may, before this one."""
        return round_number - self._present.first_round >= self._rotation

    def post(self, sender: str, message: KeyMessage, now: float, *, unused: bool) -> None:
        """Store a message; `unused` says that nothing of the open round is stored yet.

        Raises:
            Refusal: it is for another epoch or stage, too late, or differs from one that is stored.
        """
        self._check_form(message)
        stored = self._store.key_message(sender, message)
        if stored is not None and message.epoch == self.epoch:
            if stored != message.payload:
                raise Refusal(
                    RefusalKind.CONFLICT,
                    "KEY_MESSAGE_DIFFERS",
                    f"another {message.stage} of {sender!r} is stored for key epoch {message.epoch}",
                    "the first one counts: send it again, or wait for the next epoch",
                )
            return
        if message.stage == epochs.LOST:
            state, answer = self._present.lose(sender, message.epoch, now, unused=unused)
        else:
            state, answer = self._present.post(sender, message.epoch, message.stage, now)
        if answer is not Answer.ACCEPTED:
            raise _not_now(
                _REASONS.get(answer, "KEY_EPOCH_CLOSED"),
                f"the {message.stage} for key epoch {message.epoch} does not count: {answer.value}",
                _ENROL_AGAIN,
            )
        if state.epoch != self.epoch:
            log.warning("%s has lost key epoch %d; epoch %d begins", sender, self.epoch, state.epoch)
            self.begin(state, {})
            return
        self._store.add_key_message(sender, message, self.record(state))
        self._present = state
        if message.stage == epochs.BOX:
            of, boxed = self._boxed
            here = boxed if of == message.epoch else frozenset()
            self._boxed = message.epoch, here | {message.recipient}
        if message.stage == epochs.LOST:
            log.warning("%s has lost key epoch %d; the others go on without it", sender, state.epoch)
        elif self.ready and message.stage == epochs.CONFIRMATION:
            log.info("key epoch %d: confirmed by all %d members", state.epoch, len(state.members))

    def _check_form(self, message: KeyMessage) -> None:
        _check_stage(message.stage)
        if (message.stage == epochs.BOX) != bool(message.recipient):
            raise Refusal(
                RefusalKind.INVALID,
                "WRONG_RECIPIENT",
                f"key_message.recipient is {message.recipient!r} in stage {message.stage!r}",
                f"only {epochs.BOX!r} is for one member, everything else is for all",
            )
        if message.recipient and message.recipient not in self._present.members:
            raise _not_now(
                "NOT_IN_KEY_EPOCH",
                f"{message.recipient!r} is not a member of key epoch {self.epoch}",
                "seal boxes for the members of the epoch only",
            )

    def read(self, reader: str, epoch: int, stage: str) -> dict[str, bytes]:
        """Messages of a stage by sender; empty while they may not be read yet.

        Raises:
            Refusal: there is no such stage, or the epoch was replaced by a newer one.
        """
        _check_stage(stage)
        if epoch < self.epoch:
            why = f"key epoch {epoch} was replaced by {self.epoch}"
            raise _not_now("KEY_EPOCH_REPLACED", why, _ENROL_AGAIN)
        if not self._present.readable(epoch, stage):
            return {}
        return self._store.key_messages(epoch, stage, reader)

    def fewer(self, reader: str, epoch: int, stage: str, count: int) -> bool:
        """See `KeyEpoch.fewer`; a box counts for the one that it is for. Takes no lock."""
        if stage != epochs.BOX:
            return self._present.fewer(epoch, stage, count)
        of, boxed = self._boxed
        return epoch == self.epoch != self._resumed and not (of == epoch and reader in boxed)

    def advance(self, expected: Collection[str], now: float) -> bool:
        """Let time pass; True if the epoch changed. `expected` are members that are known to be there."""
        state = self._present.advance(expected, now)
        if state == self._present:
            return False
        if state.epoch != self._present.epoch:
            log.warning(
                "key epoch %d had no answer in time from %s; epoch %d begins%s",
                self.epoch,
                ", ".join(self._present.waiting_for(expected)) or "enough members",
                state.epoch,
                f" without {', '.join(sorted(state.excluded))}" if state.excluded else "",
            )
            self._store.replace_key_epoch(state.epoch, self.record(state))
        elif state.phase is not self._present.phase:
            log.info("key epoch %d: agreeing among %s", state.epoch, ", ".join(state.members))
            self._store.put(self.record(state))
        else:
            missing = ", ".join(self._present.waiting_for(expected))
            log.warning("key epoch %d: still waiting for %s to join", state.epoch, missing)
        self._present = state
        return True

    def for_round(self, round_number: int, *, renew: bool, now: float) -> KeyEpoch:
        """The epoch for a round that is about to open; `begin` or `adopt` makes it the present one."""
        return self._present.for_round(round_number, renew=renew or self.due(round_number), now=now)

    def begin(self, state: KeyEpoch, metadata: Mapping[str, str]) -> None:
        """Store an epoch, with other values that change with it, and go on with it."""
        self._store.replace_key_epoch(state.epoch, {**self.record(state), **metadata})
        self.adopt(state)

    def adopt(self, state: KeyEpoch) -> None:
        """Go on with an epoch that is stored."""
        if state.epoch != self.epoch:
            log.info("key epoch %d begins", state.epoch)
        self._present = state

    def describe(self, expected: Collection[str], now: float) -> tuple[tuple[str, ...], float, str]:
        """Whom the agreement waits for, for how many seconds, and what is going on."""
        waiting = self._present.waiting_for(expected)
        left = max(0.0, self._present.deadline - now)
        names = ", ".join(waiting[:10]) + (f" and {len(waiting) - 10} more" if len(waiting) > 10 else "")
        what = "to join" if self._present.phase is EpochPhase.JOINING else "to confirm"
        text = f"agreeing on the group key of epoch {self.epoch}, waiting for {names} {what}"
        return waiting, left, f"{text}, {left:.0f} s left"

    @staticmethod
    def record(state: KeyEpoch) -> dict[str, str]:
        """What the store keeps of an epoch."""
        return {_KEY: json.dumps(epochs.to_record(state))}


def _check_stage(stage: str) -> None:
    if stage not in epochs.STAGES:
        raise Refusal(
            RefusalKind.INVALID,
            "UNKNOWN_STAGE",
            f"the stage of a key agreement is {stage[:80]!r}",
            f"use one of {', '.join(epochs.STAGES)}",
        )


def check_key_epoch(keys: KeyRelay | None, header: UploadHeader) -> None:
    """Refuse an upload that is not under the present key epoch, or under one that is not agreed yet.

    Where nothing is encrypted, without `keys`, the epoch is 0.
    """
    epoch = 0 if keys is None else keys.epoch
    if header.key_epoch != epoch:
        raise _not_now(
            "KEY_EPOCH_REPLACED",
            f"the upload is encrypted under key epoch {header.key_epoch}, round {header.round} uses {epoch}",
            "enrol again, take part in the agreement of the present epoch, and encrypt anew",
        )
    if keys is not None and not keys.ready:
        raise _not_now(
            "KEY_NOT_AGREED",
            f"key epoch {epoch} is not confirmed by all its members yet",
            "finish the key agreement before encrypting",
        )


def required(keys: KeyRelay | None, settings: ServerSettings) -> KeyRelay:
    """The key agreement of a run; Refusal where nothing is encrypted."""
    if keys is None:
        raise _not_now(
            "NOTHING_ENCRYPTED",
            f"back end {settings.terms.encryption.backend!r} needs no group key",
            "compare the roster's encryption terms on both sides",
        )
    return keys


def _not_now(reason: str, message: str, remedy: str) -> Refusal:
    return Refusal(RefusalKind.PRECONDITION, reason, message, remedy)
