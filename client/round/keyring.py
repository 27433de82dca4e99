"""The group keys of a client: agreed on through the server's board, kept until they are of no more use.

The server announces epochs and rounds, so it could keep an old key in use. The client therefore counts for
itself, and encrypts under a key only within the roster's terms: `Keyring.encryption_key`.
"""

import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.client.state import OLDER_COPY
from fedmosaic.client.transport.grpc import Transport
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.encryption.ciphers import generate_group_secret, group_secret_bytes
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.files import private_directory, sync_directory, write_atomically
from fedmosaic.privacy.groupkey import agreement as agreements
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.groupkey.messages import Epoch
from fedmosaic.privacy.groupkey.nonces import NonceCounter, rotation_reason
from fedmosaic.protos.errors import EncryptionError, KeyAgreementError, KeyExpiredError, StateError
from fedmosaic.protos.messages import KeyMessage
from fedmosaic.protos.refusal import Refusal

log = logging.getLogger(__name__)
_POLL_SECONDS = 20.0
_KEPT_EPOCHS = 2
_UNCONFIRMED = "epoch-unconfirmed.json"
Messages = dict[str, bytes]


@dataclass(frozen=True)
class _Agreed:
    """A group key with what limits its use: the round and the roster (its hash) that it was agreed on in."""

    key: GroupKey
    first_round: int
    roster_hash: bytes

    def content(self) -> dict[str, object]:
        """As it is stored."""
        return {
            "first_round": self.first_round,
            "roster_hash": self.roster_hash.hex(),
            "key": self.key.dump().decode(),
        }


class Keyring:
    """Agrees on one key per epoch and remembers the two newest.

    Keys are on this client's disk (mode 0600), so that a restarted process can go on in its epoch: a key
    is there before this client confirms that it holds it, and is used once all members have confirmed. A
    key older than the previous epoch is deleted, and all of them after this client's last round (`forget`):
    what they could read is not needed any more.
    """

    def __init__(
        self, client_id: str, key: Ed25519PrivateKey, roster: Roster, transport: Transport, directory: Path
    ) -> None:
        self._client_id = client_id
        self._signing_key = key
        self._roster = roster
        self._transport = transport
        self._directory = directory
        private_directory(directory)
        self.counter = NonceCounter(directory / "counter.json", roster.federation)
        self._keys: dict[int, _Agreed] = {}
        self._retired = -1

    def renew(self, signing_key: Ed25519PrivateKey, roster: Roster) -> None:
        """Go on under another roster: the keys of before decrypt, and encrypt nothing more."""
        self._signing_key, self._roster = signing_key, roster

    def key(self, epoch: int) -> GroupKey:
        """The key of an epoch that was agreed on, to decrypt; KeyAgreementError if there is none here."""
        return self._agreed(epoch).key

    def encryption_key(self, epoch: int, round_number: int) -> GroupKey:
        """The key of an epoch that the server announced, to encrypt the upload of a round.

        Raises:
            KeyExpiredError: the roster's terms ask for a new key first, whatever the server says.
            KeyAgreementError: there is no such key here.
        """
        agreed = self._agreed(epoch)
        if (reason := self._expired(agreed, round_number)) is not None:
            raise KeyExpiredError(
                f"key epoch {epoch} must not encrypt round {round_number}: {reason}; the server has to begin "
                f"a new key epoch (rotate_key_every is {self._roster.terms.schedule.rotate_key_every})"
            )
        return agreed.key

    def retire(self, epoch: int) -> None:
        """Encrypt nothing more under this epoch and earlier ones; decrypting goes on."""
        self._retired = max(self._retired, epoch)

    def forget(self) -> None:
        """Delete every key, also half-written ones. The counter stays: no epoch is ever opened again.

        Right once this client's last upload is acknowledged: all that it receives was opened before that
        upload was made. Doing it again does nothing.
        """
        self._keys.clear()
        kept = list(self._directory.glob("epoch-*"))
        for path in kept:
            path.unlink(missing_ok=True)
        if kept:
            sync_directory(self._directory)
            log.info("no round is left: %d group key file(s) deleted", len(kept))

    def _expired(self, agreed: _Agreed, round_number: int) -> str | None:
        if agreed.key.epoch <= self._retired:
            return "the server said that it was replaced"
        if round_number < agreed.first_round:
            return f"it was agreed on for round {agreed.first_round} and later"
        # Members that missed the agreement are no reason: an epoch without them is lawful.
        taking_part = set(agreed.key.members) & set(self._roster.identity_keys())
        served, term = round_number - agreed.first_round, self._roster.terms.schedule.rotate_key_every
        reason = rotation_reason(agreed.key.members, taking_part, served, term)
        if reason is None and agreed.roster_hash != self._roster.hash:
            return "it was agreed on under another roster"
        return reason

    def has(self, epoch: int) -> bool:
        """Whether the key of an epoch is here, and can be read."""
        try:
            self._agreed(epoch)
        except KeyAgreementError as error:
            if self._path(epoch).exists():
                log.error("%s", error)
            return False
        return True

    def agree(self, epoch: int, round_number: int) -> GroupKey:
        """Agree on the key of an epoch with the other members, or return it if that was done.

        The epoch's rounds are counted from `round_number`, the open one.

        Raises:
            KeyExpiredError: the epoch is over by the roster's terms.
            KeyAgreementError: a member is missing, added, swapped or cheats; the next epoch may succeed.
            RefusedError: the server refuses, for example because the epoch was replaced.
        """
        if self.has(epoch):
            if epoch <= self._retired or epoch != self.counter.epoch:
                # The server, or the counter on this disk, has forgotten something of the agreement.
                raise self._without_key(epoch, f"key epoch {epoch} is not the one this client can use")
            return self.encryption_key(epoch, round_number)
        agreed, confirmation = self._unconfirmed(epoch) or self._take_part(epoch, round_number)
        self._confirm(agreed, confirmation)
        self._store(agreed)
        return agreed.key

    def _take_part(self, epoch: int, round_number: int) -> tuple[_Agreed, bytes]:
        """Join an epoch and agree on its key. Returns it, stored but not confirmed, and our confirmation."""
        try:
            self.counter.open_epoch(epoch)
        except EncryptionError as error:
            raise self._without_key(epoch, str(error)) from None
        self._post(epoch, "join", "", b"here")
        patience = self._roster.terms.schedule.gathering_seconds + _POLL_SECONDS
        least = agreements.MINIMUM_MEMBERS
        members = self._read(epoch, "join", least, patience, lambda m: len(m) >= least)
        if self._client_id not in members:
            raise KeyAgreementError(
                f"the server left this client out of key epoch {epoch}: {sorted(members)}"
            )
        if absent := sorted(set(self._roster.identity_keys()) - set(members)):
            # A server can leave members out, but not without every other member's log saying so.
            log.warning("key epoch %d has no %s, who are on the roster", epoch, ", ".join(absent))
        try:
            key, confirmation = self._run(epoch, members)
        except Refusal as refusal:
            if refusal.reason != "KEY_MESSAGE_DIFFERS":
                raise
            raise StateError(
                f"this client took part in key epoch {epoch} before and has forgotten it: "
                f"{self._directory.parent} {OLDER_COPY}"
            ) from None
        agreed = _Agreed(key, round_number, self._roster.hash)
        content = agreed.content() | {"confirmation": confirmation.hex()}
        write_atomically(self._directory / _UNCONFIRMED, json.dumps(content).encode())
        return agreed, confirmation

    def _without_key(self, epoch: int, reason: str) -> KeyAgreementError:
        """Tell the server that this client can have no part in an epoch: nobody is to wait for it there."""
        self._post(epoch, "lost", "", b"")
        return KeyAgreementError(f"{reason}; the server was asked for a new key epoch")

    def _plan(self, epoch: int, members: Collection[str]) -> Epoch:
        roster = self._roster
        keys, digest = roster.identity_keys(), roster.terms.encryption.digest()
        return agreements.plan_epoch(roster.federation, epoch, members, keys, roster.hash, digest)

    def _run(self, epoch: int, members: Collection[str]) -> tuple[GroupKey, bytes]:
        parameters = self._roster.terms.encryption
        secret, size = partial(generate_group_secret, parameters), group_secret_bytes(parameters)
        plan = self._plan(epoch, members)
        agreement = agreements.KeyAgreement(self._signing_key, self._client_id, plan, secret, size)
        self._post(epoch, "opening", "", agreement.opening())
        boxes = agreement.accept_openings(self._all(epoch, "opening", members))
        if boxes is not None:
            for recipient, box in boxes.items():
                self._post(epoch, "box", recipient, box)
        else:
            leader = agreement.leader
            received = self._read(epoch, "box", 1, self._patience, lambda m: leader in m)
            if leader is None or leader not in received:
                raise KeyAgreementError(f"the leader {leader!r} of key epoch {epoch} sent no key")
            agreement.accept_box(received[leader])
        return agreement.unconfirmed(), agreement.confirmation()

    def _confirm(self, agreed: _Agreed, confirmation: bytes) -> None:
        """Say that we hold the key, and check that all other members do; until then it encrypts nothing."""
        key = agreed.key
        self._post(key.epoch, "confirmation", "", confirmation)
        received = self._all(key.epoch, "confirmation", key.members)
        if missing := sorted(set(key.members) - set(received)):
            raise KeyAgreementError(f"confirmations of members are missing: {', '.join(missing)}")
        try:
            agreements.check_confirmations(self._plan(key.epoch, key.members), key, received)
        except KeyAgreementError:
            (self._directory / _UNCONFIRMED).unlink(missing_ok=True)
            raise

    def _unconfirmed(self, epoch: int) -> tuple[_Agreed, bytes] | None:
        """What an earlier process, or an attempt that waited in vain, held of this epoch."""
        path = self._directory / _UNCONFIRMED
        try:
            agreed, stored = self._read_key(path)
            confirmation = bytes.fromhex(str(stored.get("confirmation")))
        except FileNotFoundError:
            return None
        except (KeyAgreementError, ValueError) as error:
            log.error("%s: %s", path, error)
            return None
        if agreed.key.epoch != epoch or agreed.roster_hash != self._roster.hash:
            return None
        log.info("key epoch %d: going on with the confirmations", epoch)
        return agreed, confirmation

    @property
    def _patience(self) -> float:
        return self._roster.terms.schedule.key_patience_seconds

    def _all(self, epoch: int, stage: str, members: Collection[str]) -> Messages:
        return self._read(epoch, stage, len(members), self._patience, lambda m: set(members) <= set(m))

    def _read(
        self, epoch: int, stage: str, expected: int, seconds: float, enough: Callable[[Messages], bool]
    ) -> Messages:
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            wait = max(0.1, min(_POLL_SECONDS, left))
            messages = self._transport.read_key_messages(epoch, stage, expected, wait)
            if enough(messages) or left <= 0:
                return messages

    def _post(self, epoch: int, stage: str, recipient: str, payload: bytes) -> None:
        self._transport.post_key_message(KeyMessage(epoch, stage, recipient, payload))

    def _path(self, epoch: int) -> Path:
        return self._directory / f"epoch-{epoch:010d}.json"

    def _store(self, agreed: _Agreed) -> None:
        key = agreed.key
        write_atomically(self._path(key.epoch), json.dumps(agreed.content()).encode())
        (self._directory / _UNCONFIRMED).unlink(missing_ok=True)
        self._keys[key.epoch] = agreed
        for path in sorted(self._directory.glob("epoch-*.json"))[:-_KEPT_EPOCHS]:
            path.unlink()
        for epoch in sorted(self._keys)[:-_KEPT_EPOCHS]:
            del self._keys[epoch]
        others, fingerprint = (m for m in key.members if m != self._client_id), key.fingerprint.hex()[:16]
        log.info("key epoch %d: agreed with %s, fingerprint %s", key.epoch, ", ".join(others), fingerprint)

    def _agreed(self, epoch: int) -> _Agreed:
        if epoch in self._keys:
            return self._keys[epoch]
        path = self._path(epoch)
        try:
            agreed, _ = self._read_key(path)
        except FileNotFoundError:
            words = f"this client was not part of key epoch {epoch} and cannot read its uploads"
            raise KeyAgreementError(words) from None
        if agreed.key.epoch != epoch:
            raise KeyAgreementError(f"{path} holds the key of epoch {agreed.key.epoch}")
        self._keys[epoch] = agreed
        return agreed

    def _read_key(self, path: Path) -> tuple[_Agreed, dict[str, Any]]:
        text = path.read_bytes()
        try:
            stored = parse_json(text)
            key = GroupKey.load(stored["key"].encode())
            agreed = _Agreed(key, int(stored["first_round"]), bytes.fromhex(stored["roster_hash"]))
        except (StateError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            words = f"{path} is damaged ({type(error).__name__}): its key is lost, the next epoch has another"
            raise KeyAgreementError(words) from None
        if key.federation != self._roster.federation:
            raise KeyAgreementError(f"{path} holds a key of federation {key.federation!r}")
        return agreed, stored
