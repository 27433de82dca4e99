"""What a witness is shown of a closed round and what it answers; and the digest that it countersigns.

Its signature says: this recipient's aggregate of this round is this row applied to these uploads, each of
which its client has signed for this round.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import WireError
from fedmosaic.protos.messages import LedgerHead, SectionHeader, SectionName, UploadHeader, WeightRow
from fedmosaic.protos.signing import fields_digest, number, upload_digest


@dataclass(frozen=True)
class ReviewHeader(bounds.Message):
    """The round of the uploads, and how many of these, with their payloads, and of aggregates follow."""

    run_id: bounds.RunId
    round: bounds.Round
    key_epoch: bounds.KeyEpoch
    uploads: Annotated[int, Field(strict=True, ge=0, le=bounds.MAX_MEMBERS)]
    aggregates: Annotated[int, Field(strict=True, ge=0, le=2 * bounds.MAX_MEMBERS)]


@dataclass(frozen=True)
class SignedUpload(bounds.Message):
    """What a client signed with an upload; of its task profile, if there was one, the digest alone."""

    client: bounds.Identifier
    key_epoch: bounds.KeyEpoch
    sections: tuple[SectionHeader, ...]
    profile_sha256: bounds.HashOrNothing
    ledger_head: bounds.HashOrNothing
    ledger_follows: bounds.HashOrNothing
    signature: bounds.Signature

    @classmethod
    def of(cls, client: str, header: UploadHeader) -> "SignedUpload":
        """What a witness needs of an upload's header."""
        profile = b"" if header.profile is None else header.profile.digest()
        ledger = (b"", b"") if header.ledger is None else (header.ledger.head, header.ledger.follows)
        return cls(client, header.key_epoch, header.sections, profile, *ledger, header.signature)

    def digest(self, federation: str, run_id: str, round_number: int) -> bytes:
        """What the client has signed if the upload is of this federation, run and round."""
        return upload_digest(
            federation=federation,
            run_id=run_id,
            round_number=round_number,
            client_id=self.client,
            key_epoch=self.key_epoch,
            sections=self.sections,
            profile=self.profile_sha256,
            ledger=LedgerHead(self.ledger_head, self.ledger_follows) if self.ledger_head else None,
        )


@dataclass(frozen=True)
class AggregateClaim(bounds.Message):
    """What the server says of one section of one recipient's aggregate; `sha256` is of the payload."""

    recipient: bounds.Identifier
    section: SectionName
    row: WeightRow
    sha256: bounds.Hash


@dataclass(frozen=True)
class Verdict(bounds.Message):
    """What the witness says of one claim: `uploads_digest` and a countersignature, or why there is none."""

    run_id: bounds.RunId
    round: bounds.Round
    recipient: bounds.Identifier
    section: SectionName
    uploads_sha256: bounds.HashOrNothing
    signature: bounds.SignatureOrNothing
    refusal: bounds.Text

    def __post_init__(self) -> None:
        if not bool(self.signature) == bool(self.uploads_sha256) == (not self.refusal):
            raise WireError("a verdict has a signature and the digest of uploads, or a refusal")


def uploads_digest(row: WeightRow, uploads: Mapping[str, bytes]) -> bytes:
    """SHA-256 that names the uploads of a row's contributors; `uploads` has their content hashes."""
    fields = [part for name in row.contributors for part in (name.encode(), uploads[name])]
    return fields_digest([b"fedmosaic/witnessed-uploads/v1", *fields])


def countersigned_digest(
    *,
    federation: str,
    run_id: str,
    round_number: int,
    key_epoch: int,
    section: str,
    recipient: str,
    row: WeightRow,
    aggregate_sha256: bytes,
    uploads_sha256: bytes,
) -> bytes:
    """What a witness signs of one aggregate: SHA-256, 32 bytes.

    Round and key epoch are those of the uploads; `section` is the label of the vector, "shared" or "family:"
    and the family's name; `uploads_sha256` is `uploads_digest`.
    """
    fields = [b"fedmosaic/countersignature/v1", federation.encode(), run_id.encode(), number(round_number)]
    fields += [number(key_epoch), section.encode(), recipient.encode(), number(row.bits)]
    fields.append(number(len(row.contributors)))
    for name, weight in zip(row.contributors, row.weights, strict=True):
        fields += [name.encode(), number(weight)]
    return fields_digest([*fields, aggregate_sha256, uploads_sha256])
