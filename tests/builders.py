"""What many tests need: a public mechanism, a federation to found, and a charge to a ledger."""

from typing import Any

from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.kits import FederationConfig, MemberEntry
from fedmosaic.privacy.federation.roster import Terms
from fedmosaic.privacy.ledger.ledger import Ledger, data_epoch
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction

EPOCH = data_epoch(["a", "b", "c"])
DIGEST = "a" * 64


def tiny_mechanism(**changes: Any) -> ProfileMechanism:
    """The mechanism of a task profile of 32 numbers, of a probe that nobody has to have."""
    reduction = Reduction(hidden_size=8, intermediate_size=16, projection_dimensions=32)
    fields = {"probe": "tiny", "probe_sha256": "0" * 64, "reduction": reduction}
    return ProfileMechanism.model_validate(fields | changes)


def founding(*ids: str, name: str = "clinics", **changes: Any) -> FederationConfig:
    """A federation of these members, with other terms than the defaults where they are given."""
    terms = Terms.model_validate({"profile": tiny_mechanism()} | changes)
    members = tuple(MemberEntry(id=member) for member in ids or "abcd")
    return FederationConfig(federation=name, members=members, terms=terms)


def charge(
    ledger: Ledger,
    event: GaussianEvent,
    channel: str = "adapter",
    round: int = 0,
    *,
    ids: list[str] | None = None,
    digest: str | None = None,
    **changes: Any,
) -> int:
    """Reserve a release, with evidence if ids are given, and record it as made if a digest is.

    Returns:
        Sequence of the reservation.
    """
    fields: dict[str, Any] = {
        "data_epoch": data_epoch(ids) if ids else EPOCH,
        "secure_noise": True,
        "clipping_norm": 1.0,
        "dimensions": 8,
        "example_ids": ids,
    }
    sequence = ledger.reserve(channel, round, event, **(fields | changes))  # type: ignore[arg-type]  # a literal
    if digest is not None:
        ledger.released(sequence, digest)
    return sequence
