"""Agree on the group key of one epoch: exactly the pinned members, through a server that learns nothing.

    1. every member   opening()               signed ephemeral X25519 key
    2. every member   accept_openings(all)    all signatures against the pinned roster; the transcript hash H
                                              elects the leader, who draws the key and returns sealed boxes
    3. others         accept_box(box)         open, compare with the leader's signed commitment
    4. every member   confirmation()          signed commitment, and a tag that only holders can make
    5. every member   check_confirmations()   all tags and commitments agree: the key may be used

The server can delay or refuse. It cannot add, drop or swap a member or replay an epoch, nor can a leader hand
out different keys: each ends in a `KeyAgreementError`. One member together with the server reads everything.

HPKE in base mode (X25519, HKDF-SHA256, AES-256-GCM) seals boxes. Its `info` binds a box to transcript, epoch,
leader, recipient and commitment; the leader's signature around it says who sealed it.

Reference: HPKE, RFC 9180; X25519, RFC 7748; Ed25519, RFC 8032.
"""

import enum
import hmac
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedmosaic.privacy.groupkey import messages
from fedmosaic.privacy.groupkey.key import KEY_BYTES, GroupKey, commitment_to
from fedmosaic.privacy.groupkey.messages import Epoch, sha256
from fedmosaic.protos.errors import KeyAgreementError

MINIMUM_MEMBERS = 4
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_SEALING_BYTES = 32 + 16
"""What HPKE adds: the encapsulated X25519 key before, the tag after the secrets."""


def plan_epoch(
    federation: str,
    number: int,
    members: Collection[str],
    roster_keys: Mapping[str, bytes],
    roster_hash: bytes,
    parameters_hash: bytes,
) -> Epoch:
    """Fix who takes part in an epoch, as `NonceCounter.open_epoch` checked it, and on which terms.

    KeyAgreementError if the list is too short, repeats a member or names one outside the pinned roster, of
    whose keys (Ed25519, raw) it takes its own.
    """
    if len(set(members)) != len(members):
        raise KeyAgreementError("the list of members names one twice")
    foreign = sorted(set(members) - set(roster_keys))
    if foreign:
        raise KeyAgreementError(f"members outside the pinned roster: {', '.join(foreign)}")
    if len(members) < MINIMUM_MEMBERS:
        raise KeyAgreementError(
            f"{len(members)} members take part, at least {MINIMUM_MEMBERS} are required: with fewer, an "
            "aggregate reveals single adapters"
        )
    if len(roster_hash) != 32 or len(parameters_hash) != 32:
        raise KeyAgreementError("hashes of roster and parameters must have 32 bytes each")
    if not 0 <= number < 1 << 64:
        raise KeyAgreementError(f"epoch is {number}, expected 0 to 2^64 − 1")
    chosen = tuple(sorted(members))
    keys = {member: bytes(roster_keys[member]) for member in chosen}
    return Epoch(federation, number, roster_hash, parameters_hash, chosen, keys)


class _Stage(enum.Enum):
    OPENED = "accept_openings"
    WAITS_FOR_BOX = "accept_box"
    HAS_KEY = "confirmation"
    FAILED = "a new epoch"


class KeyAgreement:
    """One member's part in one epoch. Holds secrets in memory only; after any error it is of no more use.

    A process that restarts before it held the key starts again with another epoch number. One that held it
    stores `unconfirmed`, confirms as before, and holds the others to `check_confirmations`. The leader alone
    draws the CKKS secret.
    """

    def __init__(
        self,
        identity: Ed25519PrivateKey,
        member: str,
        epoch: Epoch,
        generate_secret: Callable[[], bytes],
        secret_bytes: int,
    ) -> None:
        if member not in epoch.members:
            raise KeyAgreementError(f"{member!r} does not take part in epoch {epoch.number}")
        if identity.public_key().public_bytes_raw() != epoch.identity_keys[member]:
            raise KeyAgreementError(f"the roster pins another identity key for {member!r} than is held here")
        self.epoch = epoch
        self.member = member
        self.leader: str | None = None
        self._identity = identity
        self._generate_secret = generate_secret
        self._secret_bytes = secret_bytes
        self._ephemeral: X25519PrivateKey | None = X25519PrivateKey.generate()
        public_key = self._ephemeral.public_key().public_bytes_raw()
        self._opening = messages.write_opening(epoch, member, public_key, identity)
        self._transcript = b""
        self._key: GroupKey | None = None
        self._stage = _Stage.OPENED

    def opening(self) -> bytes:
        """This member's signed opening, of `OPENING_BYTES` bytes; the same at every call."""
        return self._opening

    def accept_openings(self, openings: Mapping[str, bytes]) -> dict[str, bytes] | None:
        """Check all members' openings, as relayed, and elect the leader, who gets a sealed box per other."""
        with self._step(_Stage.OPENED):
            _expect_members(self.epoch, "openings", openings)
            if openings[self.member] != self._opening:
                raise KeyAgreementError(f"the opening of {self.member!r} is not the one this member sent")
            public_keys = {
                name: messages.read_opening(self.epoch, name, openings[name]) for name in self.epoch.members
            }
            if len(set(public_keys.values())) != len(public_keys):
                raise KeyAgreementError("two members opened with the same ephemeral key")
            for name, public_key in public_keys.items():
                _check_order(self._ephemeral, public_key, f"ephemeral key of {name!r}")
            parts = [openings[name] for name in self.epoch.members]
            self._transcript = sha256(b"transcript", self.epoch.terms_hash(), *parts)
            self.leader = _leader(self.epoch, self._transcript)
            if self.leader != self.member:
                self._stage = _Stage.WAITS_FOR_BOX
                return None
            self._key = self._new_key(os.urandom(KEY_BYTES), self._generate_secret())
            self._ephemeral = None
            self._stage = _Stage.HAS_KEY
            return {
                name: self._sealed(name, public_key)
                for name, public_key in public_keys.items()
                if name != self.member
            }

    def accept_box(self, box: bytes) -> None:
        """Open the leader's box for this member, as relayed, and hold it to the leader's commitment."""
        with self._step(_Stage.WAITS_FOR_BOX):
            leader = self.leader
            if leader is None or self._ephemeral is None:
                raise KeyAgreementError("no leader is elected yet")
            what, size = f"sealed key of leader {leader!r}", KEY_BYTES + self._secret_bytes + _SEALING_BYTES
            about = messages.BOX, self._transcript, self.member, self.epoch.identity_keys[leader]
            commitment, sealed = messages.read_about_key(what, *about, box, size)
            try:
                secrets = _HPKE.decrypt(sealed, self._ephemeral, info=self._bound(self.member, commitment))
            except (InvalidTag, ValueError):
                raise KeyAgreementError(f"the {what} does not open: it was sealed for another key") from None
            key = self._new_key(secrets[:KEY_BYTES], secrets[KEY_BYTES:])
            if key.fingerprint != commitment:
                raise KeyAgreementError(f"leader {leader!r} sealed another key than it committed to")
            self._key = key
            self._ephemeral = None
            self._stage = _Stage.HAS_KEY

    def confirmation(self) -> bytes:
        """This member's signed confirmation, of `CONFIRMATION_BYTES` bytes."""
        key = self.unconfirmed()
        about = messages.CONFIRMATION, self._transcript, self.member, key.fingerprint
        return messages.write_about_key(*about, _tag(key, self.member), self._identity)

    def unconfirmed(self) -> GroupKey:
        """The key before the others have confirmed it: to store, and to encrypt nothing with."""
        if self._key is None:
            raise KeyAgreementError(f"member {self.member!r} holds no key: {self._stage.value} first")
        return self._key

    @contextmanager
    def _step(self, expected: _Stage) -> Iterator[None]:
        if self._stage is not expected:
            raise KeyAgreementError(
                f"{expected.value} is out of turn in epoch {self.epoch.number}: next is {self._stage.value}"
            )
        try:
            yield
        except BaseException:
            self._stage = _Stage.FAILED
            self._ephemeral = self._key = None
            raise

    def _new_key(self, master: bytes, ckks_secret: bytes) -> GroupKey:
        if len(ckks_secret) != self._secret_bytes:
            raise KeyAgreementError(f"CKKS secret: {len(ckks_secret)} bytes, expected {self._secret_bytes}")
        fingerprint = commitment_to(self._transcript, master, ckks_secret)
        about = self.epoch.federation, self.epoch.number, self.epoch.members, self.epoch.parameters_hash
        return GroupKey(*about, self._transcript, fingerprint, master, ckks_secret)

    def _sealed(self, recipient: str, recipient_key: bytes) -> bytes:
        key = self._key
        if key is None:
            raise KeyAgreementError("no key to seal")
        public = X25519PublicKey.from_public_bytes(recipient_key)
        info = self._bound(recipient, key.fingerprint)
        sealed = _HPKE.encrypt(key.master + key.ckks_secret, public, info=info)
        return messages.write_about_key(
            messages.BOX, self._transcript, recipient, key.fingerprint, sealed, self._identity
        )

    def _bound(self, recipient: str, commitment: bytes) -> bytes:
        leader = (self.leader or "").encode()
        number = self.epoch.number.to_bytes(8, "little")
        return sha256(b"box", self._transcript, number, leader, recipient.encode(), commitment)


def check_confirmations(epoch: Epoch, key: GroupKey, confirmations: Mapping[str, bytes]) -> None:
    """Check, by their confirmations as relayed, that all members of an epoch hold the same key."""
    _expect_members(epoch, "confirmations", confirmations)
    for name in epoch.members:
        about = messages.CONFIRMATION, key.transcript, name, epoch.identity_keys[name]
        commitment, tag = messages.read_about_key(
            f"confirmation of {name!r}", *about, confirmations[name], messages.TAG_BYTES
        )
        if commitment != key.fingerprint:
            leader = _leader(epoch, key.transcript)
            raise KeyAgreementError(
                f"{name!r} holds another key: leader {leader!r} handed out different keys"
            )
        if not hmac.compare_digest(tag, _tag(key, name)):
            raise KeyAgreementError(f"{name!r} confirms a key that it cannot prove to hold")


def _expect_members(epoch: Epoch, what: str, received: Mapping[str, bytes]) -> None:
    missing = sorted(set(epoch.members) - set(received))
    if missing:
        raise KeyAgreementError(f"{what} of members are missing: {', '.join(missing)}")
    added = sorted(set(received) - set(epoch.members))
    if added:
        raise KeyAgreementError(f"{what} came from outside the agreed list of members: {', '.join(added)}")


def _leader(epoch: Epoch, transcript: bytes) -> str:
    return min(epoch.members, key=lambda name: sha256(b"leader", transcript, name.encode()))


def _tag(key: GroupKey, member: str) -> bytes:
    content = sha256(b"confirmed", key.transcript, member.encode(), key.fingerprint)
    return hmac.digest(key.subkey(b"confirm"), content, "sha256")


def _check_order(private_key: X25519PrivateKey | None, public_key: bytes, what: str) -> None:
    if private_key is None:
        raise KeyAgreementError("this member's ephemeral key is gone: start a new epoch")
    try:
        private_key.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise KeyAgreementError(f"{what} is a point of small order, which gives no secret") from None
