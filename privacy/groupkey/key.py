"""The group key of one epoch: what every member holds after a key agreement."""

import hashlib
import json
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.groupkey.messages import sha256
from fedmosaic.protos.errors import StateError

KEY_BYTES = 32


@dataclass(frozen=True, eq=False)
class GroupKey:
    """The secrets of one epoch, and the public facts they are bound to.

    `transcript` is the hash of all openings, `fingerprint` a public commitment to the secrets, equal at all
    members. `master` is used only through `subkey`; `ckks_secret` is empty for other back ends.
    """

    federation: str
    epoch: int
    members: tuple[str, ...]
    parameters_hash: bytes
    transcript: bytes
    fingerprint: bytes
    master: bytes = field(repr=False)
    ckks_secret: bytes = field(repr=False)

    def subkey(self, purpose: bytes, salt: bytes = b"") -> bytes:
        """Derive 32 bytes for one purpose; the salt is fresh where the purpose alone is not unique."""
        info = b"fedmosaic/subkey/v1\n" + self.transcript + purpose
        return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(self.master)

    def dump(self) -> bytes:
        """The key in clear, for a file that only its owner can read; `load` reads it back."""
        content = {"federation": self.federation, "epoch": self.epoch, "members": self.members}
        return json.dumps(
            content | {name: getattr(self, name).hex() for name in _BINARY_FIELDS}, sort_keys=True
        ).encode()

    @classmethod
    def load(cls, content: bytes) -> "GroupKey":
        """Read a dumped key; StateError if it is damaged, or its secrets do not match its fingerprint."""
        try:
            found = parse_json(content)
            key = cls(
                federation=str(found["federation"]),
                epoch=int(found["epoch"]),
                members=tuple(str(member) for member in found["members"]),
                **{name: bytes.fromhex(found[name]) for name in _BINARY_FIELDS},
            )
        except (ValueError, KeyError, TypeError):
            raise StateError("the stored group key is damaged: delete it and agree on a new epoch") from None
        if commitment_to(key.transcript, key.master, key.ckks_secret) != key.fingerprint:
            raise StateError("the stored group key does not match its fingerprint: agree on a new epoch")
        return key


_BINARY_FIELDS = ("parameters_hash", "transcript", "fingerprint", "master", "ckks_secret")


def commitment_to(transcript: bytes, master: bytes, ckks_secret: bytes) -> bytes:
    """Public commitment to the secrets of an epoch, 32 bytes."""
    return sha256(b"commitment", transcript, master, hashlib.sha256(ckks_secret).digest())
