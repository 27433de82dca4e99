"""How a client checks what the federation's witness said of an aggregate, before it decrypts it."""

import hashlib

from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.protos import witnessing
from fedmosaic.protos.errors import WitnessError
from fedmosaic.protos.messages import AggregateSection, WeightRow
from fedmosaic.protos.signing import verifies


def check_countersigned(
    roster: Roster, run_id: str, recipient: str, label: str, section: AggregateSection, row: WeightRow,
    key_epoch: int, round_number: int,
) -> None:  # fmt: skip
    """Refuse a section that the federation's witness, if it has one, has not countersigned just so.

    Key epoch and round are of the uploads; `label` is the section's name, or names its family. WitnessError
    if there is no countersignature, or one of another key, run, round, recipient, row or aggregate.
    """
    witness = roster.witness
    if witness is None:
        return
    if not section.countersignature:
        raise WitnessError(
            f"the aggregate has no countersignature of the witness {witness.id!r}: the server has not "
            "shown it, or hides what it said"
        )
    aggregate = hashlib.sha256(section.payload).digest()
    digest = witnessing.countersigned_digest(
        federation=roster.federation, run_id=run_id, round_number=round_number, key_epoch=key_epoch,
        section=label, recipient=recipient, row=row, aggregate_sha256=aggregate,
        uploads_sha256=section.uploads_sha256,
    )  # fmt: skip
    if not verifies(bytes.fromhex(witness.identity_key), section.countersignature, digest):
        raise WitnessError(
            f"the countersignature is not that of the witness {witness.id!r} over this aggregate: it is "
            f"by another key, or of another run, round than {round_number}, recipient, row or sum"
        )
