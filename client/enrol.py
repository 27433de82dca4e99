"""What a client brings to a federation, and the comparison of both sides before its first round."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from fedmosaic import __version__
from fedmosaic.client.releases import Releases
from fedmosaic.client.transport.grpc import Transport
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import PROTOCOL_VERSION, Enrolled, Enrolment


class Learner(Protocol):
    """What a session asks of the model side. The session never sees a model, an example or a gradient."""

    @property
    def adapter_spec_hash(self) -> bytes:
        """SHA-256 of the shared layout, equal for all members."""

    @property
    def family(self) -> str:
        """Architecture name for family sharing; empty if none."""

    def load_global(self, section: str, vector: np.ndarray) -> None:
        """Load an aggregate into the frozen global branch."""

    def keep_own(self, section: str) -> None:
        """No aggregate: the global branch becomes a copy of the local one (released code, §2.6 step 1)."""

    def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
        """Train for one round; under DP, charge through `releases` before any noise is drawn.

        Whatever was received, it ends, and takes the steps of any round. Where nothing can be trained beside
        what was received, it calls `give_up` and goes on as after `keep_own`.
        """

    def sections(self) -> Mapping[str, np.ndarray]:
        """What is shared now: section name → float32 vector."""

    def save(self, directory: Path) -> None:
        """Write every branch, the gate and the sampler's position."""

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""


def ask_to_enrol(
    transport: Transport,
    roster: Roster,
    adapter_spec_hash: bytes,
    family: str,
    *,
    check_only: bool = False,
    ledger_head: bytes = b"",
    ledger_signature: bytes = b"",
) -> Enrolled:
    """Compare what both sides believe about the federation, and enrol unless it is to be checked only.

    Args:
        transport: way to the server.
        roster: this client's.
        adapter_spec_hash: SHA-256 of the shared layout.
        family: architecture name; empty if none.
        check_only: leave the server as it is; a model need not be loaded yet.
        ledger_head: anchor of this client's privacy ledger, for the server to keep; empty for none.
        ledger_signature: this client's, over `fedmosaic.protos.signing.ledger_digest`.

    Raises:
        RefusedError: the server refuses this client; the reason and the remedy are in the message.
        PolicyError: the server wants another number of rounds than the roster's terms.
        TransportError: the server cannot be reached for longer than the transport's patience.
    """
    enrolled = transport.enrol(
        Enrolment(
            protocol_version=PROTOCOL_VERSION,
            federation=roster.federation,
            roster_hash=roster.hash,
            adapter_spec_hash=adapter_spec_hash,
            family=family,
            software=f"fedmosaic {__version__}",
            check_only=check_only,
            ledger_head=ledger_head,
            ledger_signature=ledger_signature,
        )
    )
    agreed = roster.terms.schedule.rounds
    if enrolled.rounds != agreed:
        raise PolicyError(
            f"the server runs {enrolled.rounds} rounds, the signed terms say {agreed}; nothing was sent. "
            "Ask who runs the server: more rounds are more weight rows, from which recipients learn more"
        )
    return enrolled
