"""What stands between a vector and the wire: clipping to the agreed range, encryption, signature."""

import hashlib
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmosaic.client.keyring import Keyring
from fedmosaic.privacy.encryption.cipher import ClientCipher
from fedmosaic.privacy.encryption.ciphers import create_cipher
from fedmosaic.privacy.encryption.records import NONCE_BYTES, RoundContext
from fedmosaic.privacy.federation.identity import public_hex
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.protos.errors import IdentityError, WitnessError
from fedmosaic.protos.messages import (
    SECTION_NAMES,
    AggregateSection,
    LedgerHead,
    Profile,
    Section,
    Upload,
    WeightRow,
)
from fedmosaic.protos.signing import sign_upload
from fedmosaic.protos.witnessing import countersigned_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Who this client is.

    Attributes:
        client_id: as on the roster and in the TLS certificate.
        signing_key: Ed25519 identity key that the roster pins.
    """

    client_id: str
    signing_key: Ed25519PrivateKey

    @classmethod
    def of(cls, kit: Kit) -> "Identity":
        """The owner of a kit; IdentityError if its key is not the one on the roster."""
        member, key = kit.roster.member(kit.member_id()), kit.signing_key()
        if public_hex(key.public_key()) != member.identity_key:
            raise IdentityError(
                f"the identity key in {kit.directory} is not the one that roster {kit.roster.serial} names "
                f"for {member.id!r}; install what the consortium has signed last (`fedmosaic keys install`)"
            )
        return cls(member.id, key)


class Protection:
    """Seals what leaves this client and opens what it receives."""

    def __init__(self, identity: Identity, roster: Roster, family: str, keyring: Keyring | None) -> None:
        """Prepare the agreed back end; without a keyring only where nothing is encrypted."""
        self._identity = identity
        self._roster = roster
        self._family = family
        self._keyring = keyring
        terms = roster.terms
        # Where only sums of groups are shared, no adapter is ever sealed.
        plaintext = terms.allow_plaintext or terms.adapter.in_group_sums
        self._cipher: ClientCipher[Any] = create_cipher(
            terms.encryption, identity.client_id, terms.policy, allow_plaintext=plaintext
        )

    def renew(self, identity: Identity, roster: Roster) -> None:
        """Go on under another roster of the same terms."""
        self._identity, self._roster = identity, roster
        if self._keyring is not None:
            self._keyring.renew(identity.signing_key, roster)

    def ready(self, key_epoch: int, round_number: int) -> None:
        """Make sure that uploads of an epoch and round can be sealed; see `Keyring.agree` for the errors."""
        if self._keyring is not None:
            self._keyring.agree(key_epoch, round_number)

    def members(self, key_epoch: int) -> tuple[str, ...]:
        """Members of a key epoch that was agreed on; empty where nothing is encrypted."""
        return () if self._keyring is None else tuple(sorted(self._keyring.key(key_epoch).members))

    def retire(self, key_epoch: int) -> None:
        """Seal nothing more under an epoch that the server has replaced."""
        if self._keyring is not None:
            self._keyring.retire(key_epoch)

    def forget_keys(self) -> None:
        """Delete the group keys of a run that is over; see `Keyring.forget`."""
        if self._keyring is not None:
            self._keyring.forget()

    def check_witnessed(
        self, run_id: str, section: AggregateSection, row: WeightRow, key_epoch: int, round_number: int
    ) -> None:
        """Refuse a section that the federation's witness, if it has one, has not countersigned just so.

        Raises:
            WitnessError: no countersignature, or one of another key, run, round, recipient, row or aggregate.
        """
        witness = self._roster.witness
        if witness is None:
            return
        if not section.countersignature:
            raise WitnessError(
                f"the aggregate has no countersignature of the witness {witness.id!r}: the server has not "
                "shown it, or hides what it said"
            )
        digest = countersigned_digest(
            federation=self._roster.federation,
            run_id=run_id,
            round_number=round_number,
            key_epoch=key_epoch,
            section=self._label(section.name),
            recipient=self._identity.client_id,
            row=row,
            aggregate_sha256=hashlib.sha256(section.payload).digest(),
            uploads_sha256=section.uploads_sha256,
        )
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(witness.identity_key))
            key.verify(section.countersignature, digest)
        except (InvalidSignature, ValueError):
            raise WitnessError(
                f"the countersignature is not that of the witness {witness.id!r} over this aggregate: it is "
                f"by another key, or of another run, round than {round_number}, recipient, row or sum"
            ) from None

    def open(
        self, section: AggregateSection, row: WeightRow, key_epoch: int, round_number: int, size: int
    ) -> np.ndarray:
        """Check and decrypt one section of an aggregate.

        Args:
            section: as received.
            row: its weight row.
            key_epoch: epoch of the uploads.
            round_number: round of the uploads.
            size: length that the vector must have.

        Returns:
            (size,) float64. Under `ckks` it must stay in this process.

        Raises:
            PolicyError, CiphertextError, EncryptionError: see `ClientCipher.decrypt`.
        """
        context = self._context(section.name, key_epoch, round_number, size)
        return self._cipher.decrypt(section.payload, self._key(key_epoch), context, row)

    def seal(
        self,
        run_id: str,
        round_number: int,
        key_epoch: int,
        vectors: Mapping[str, np.ndarray],
        profile: Profile | None,
        ledger: LedgerHead | None = None,
    ) -> Upload:
        """Encrypt and sign one upload. What is sealed once is stored and re-sent, never sealed again.

        Args:
            run_id: the server's run.
            round_number: the open round.
            key_epoch: epoch of the group key.
            vectors: section name → finite vector; empty to abstain.
            profile: a new task profile or None.
            ledger: head of the privacy ledger, for the server to keep.

        Raises:
            KeyExpiredError: the epoch is over by the roster's terms; nothing was encrypted.
        """
        sections = []
        key = None
        if vectors and self._keyring is not None:
            key = self._keyring.encryption_key(key_epoch, round_number)
        for name in SECTION_NAMES:
            if name in vectors:
                vector = vectors[name]
                self._warn_of_clipping(round_number, name, vector)
                context = self._context(name, key_epoch, round_number, vector.size)
                nonce = self._nonce(key_epoch, round_number, name)
                payload = self._cipher.encrypt(vector, key, context, nonce)
                sections.append(Section(name, payload))
        attempt = uuid.uuid4().hex
        return self._signed(run_id, round_number, key_epoch, tuple(sections), profile, ledger, attempt)

    def claim_anew(self, run_id: str, upload: Upload, ledger: LedgerHead | None) -> Upload:
        """The same sealed bytes with another head of the privacy ledger; nothing is encrypted again."""
        return self._signed(
            run_id, upload.round, upload.key_epoch, upload.sections, upload.profile, ledger, upload.attempt_id
        )

    def _signed(
        self,
        run_id: str,
        round_number: int,
        key_epoch: int,
        sections: tuple[Section, ...],
        profile: Profile | None,
        ledger: LedgerHead | None,
        attempt_id: str,
    ) -> Upload:
        return sign_upload(
            self._identity.signing_key,
            federation=self._roster.federation,
            run_id=run_id,
            round_number=round_number,
            client_id=self._identity.client_id,
            key_epoch=key_epoch,
            sections=sections,
            profile=profile,
            ledger=ledger,
            attempt_id=attempt_id,
        )

    def _context(self, section: str, key_epoch: int, round_number: int, size: int) -> RoundContext:
        return RoundContext(self._roster.federation, key_epoch, round_number, self._label(section), size)

    def _label(self, section: str) -> str:
        return section if section == "shared" else f"family:{self._family}"

    def _key(self, key_epoch: int) -> GroupKey | None:
        return None if self._keyring is None else self._keyring.key(key_epoch)

    def _nonce(self, key_epoch: int, round_number: int, section: str) -> bytes:
        if self._keyring is None:
            return bytes(NONCE_BYTES)
        # A crash between this and storing the upload costs a nonce; the content is then sealed anew.
        return self._keyring.counter.take(key_epoch, round_number, section)

    def _warn_of_clipping(self, round_number: int, section: str, vector: np.ndarray) -> None:
        limit = self._roster.terms.encryption.clip
        outside = int(np.count_nonzero(np.abs(vector) > limit))
        if outside:
            log.warning(
                "round %d: %d of %d values of the %s section lie outside ±%g and are clipped",
                round_number, outside, vector.size, section, limit,
            )  # fmt: skip
