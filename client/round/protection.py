"""What stands between a vector and the wire: clipping, encryption, signature, and the witness's word."""

import hashlib
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmosaic.client.round.keyring import Keyring
from fedmosaic.privacy.encryption.cipher import ClientCipher
from fedmosaic.privacy.encryption.ciphers import create_cipher
from fedmosaic.privacy.encryption.records import NONCE_BYTES, RoundContext
from fedmosaic.privacy.federation.identity import public_hex
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.protos import witnessing
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
from fedmosaic.protos.signing import sign_upload, verifies

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Who this client is: its id on the roster, and the Ed25519 identity key that the roster pins."""

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

    def ready(self, key_epoch: int, round_number: int) -> tuple[str, ...]:
        """Make sure that uploads of an epoch and round can be sealed; see `Keyring.agree` for the errors.

        Returns the members of the epoch, sorted; none where nothing is encrypted.
        """
        if self._keyring is None:
            return ()
        return tuple(sorted(self._keyring.agree(key_epoch, round_number).members))

    def retire(self, key_epoch: int) -> None:
        """Seal nothing more under an epoch that the server has replaced."""
        if self._keyring is not None:
            self._keyring.retire(key_epoch)

    def forget_keys(self) -> None:
        """Delete the group keys of a run that is over; see `Keyring.forget`."""
        if self._keyring is not None:
            self._keyring.forget()

    def check_countersigned(
        self, run_id: str, section: AggregateSection, row: WeightRow, key_epoch: int, round_number: int
    ) -> None:
        """Refuse a section that the federation's witness, if it has one, has not countersigned just so.

        Key epoch and round are those of the uploads.

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
        digest = witnessing.countersigned_digest(
            federation=self._roster.federation,
            run_id=run_id,
            round_number=round_number,
            key_epoch=key_epoch,
            section=self.label(section.name),
            recipient=self._identity.client_id,
            row=row,
            aggregate_sha256=hashlib.sha256(section.payload).digest(),
            uploads_sha256=section.uploads_sha256,
        )
        if not verifies(bytes.fromhex(witness.identity_key), section.countersignature, digest):
            raise WitnessError(
                f"the countersignature is not that of the witness {witness.id!r} over this aggregate: it is "
                f"by another key, or of another run, round than {round_number}, recipient, row or sum"
            )

    def open(
        self, section: AggregateSection, row: WeightRow, key_epoch: int, round_number: int, size: int
    ) -> np.ndarray:
        """Check and decrypt one section of an aggregate of the uploads of a key epoch and round.

        Returns (size,) float64, which under `ckks` must stay in this process; errors as of
        `ClientCipher.decrypt`.
        """
        key = None if self._keyring is None else self._keyring.key(key_epoch)
        context = self._context(section.name, key_epoch, round_number, size)
        return self._cipher.decrypt(section.payload, key, context, row)

    def seal(
        self,
        run_id: str,
        round_number: int,
        key_epoch: int,
        vectors: Mapping[str, np.ndarray],
        profile: Profile | None,
        ledger: LedgerHead | None = None,
    ) -> Upload:
        """Encrypt and sign one upload of finite vectors by section name, or of none to abstain.

        What is sealed once is stored and re-sent, never sealed again. KeyExpiredError if the epoch is over by
        the roster's terms; nothing was encrypted then.
        """
        key, nonce, sections, limit = None, bytes(NONCE_BYTES), [], self._roster.terms.encryption.clip
        if vectors and self._keyring is not None:
            key = self._keyring.encryption_key(key_epoch, round_number)
        for name in SECTION_NAMES:
            if name not in vectors:
                continue
            vector = vectors[name]
            if outside := int(np.count_nonzero(np.abs(vector) > limit)):
                words = "round %d: %d of %d values of the %s section lie outside ±%g and are clipped"
                log.warning(words, round_number, outside, vector.size, name, limit)
            context = self._context(name, key_epoch, round_number, vector.size)
            if self._keyring is not None:
                # A crash between this and storing the upload costs a nonce; the content is sealed anew.
                nonce = self._keyring.counter.take(key_epoch, round_number, name)
            sections.append(Section(name, self._cipher.encrypt(vector, key, context, nonce)))
        upload = Upload(round_number, uuid.uuid4().hex, key_epoch, tuple(sections), profile, b"")
        return self.signed(run_id, upload, ledger)

    def signed(self, run_id: str, upload: Upload, ledger: LedgerHead | None) -> Upload:
        """The sealed bytes of an upload, signed with a head of the privacy ledger; nothing is encrypted."""
        return sign_upload(
            self._identity.signing_key,
            federation=self._roster.federation,
            run_id=run_id,
            round_number=upload.round,
            client_id=self._identity.client_id,
            key_epoch=upload.key_epoch,
            sections=upload.sections,
            profile=upload.profile,
            ledger=ledger,
            attempt_id=upload.attempt_id,
        )

    def label(self, section: str) -> str:
        """What a section is called in a record and under a countersignature: a family's names the family."""
        return section if section == "shared" else f"family:{self._family}"

    def _context(self, section: str, key_epoch: int, round_number: int, size: int) -> RoundContext:
        return RoundContext(self._roster.federation, key_epoch, round_number, self.label(section), size)
