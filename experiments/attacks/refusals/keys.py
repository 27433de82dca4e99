"""A server that cheats in the key agreement, and one that asks for a second row: all must be refused."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmosaic.client.state import ClientState
from fedmosaic.experiments.attacks.refusals.stand_in import MEMBERS
from fedmosaic.experiments.attacks.statistics.results import RefusalResult
from fedmosaic.privacy.groupkey.agreement import KeyAgreement, plan_epoch
from fedmosaic.privacy.groupkey.messages import Epoch, write_opening
from fedmosaic.privacy.groupkey.nonces import NonceCounter
from fedmosaic.protos.messages import WeightRow

_VICTIM, _OTHER = MEMBERS[:2]
_SECRET: Final = bytes(64)

Openings = dict[str, bytes]


class _Epochs:
    """Identities and plans of one federation."""

    def __init__(self) -> None:
        self.identities = {name: Ed25519PrivateKey.generate() for name in (*MEMBERS, "mallory")}

    def plan(self, number: int = 2, members: tuple[str, ...] = MEMBERS) -> Epoch:
        keys = {name: self.identities[name].public_key().public_bytes_raw() for name in MEMBERS}
        return plan_epoch("attempts", number, members, keys, b"R" * 32, b"P" * 32)

    def opening(self, name: str, epoch: Epoch, signer: str = "") -> bytes:
        public = X25519PrivateKey.generate().public_key().public_bytes_raw()
        return write_opening(epoch, name, public, self.identities[signer or name])

    def agreement(self, name: str) -> KeyAgreement:
        return KeyAgreement(self.identities[name], name, self.plan(), lambda: _SECRET, len(_SECRET))


_OPENINGS: Final[Mapping[str, Callable[[_Epochs, Openings], Openings]]] = {
    "key agreement: a member's key swapped for the server's": lambda epochs, openings: (
        openings | {_OTHER: epochs.opening(_OTHER, epochs.plan(), signer="mallory")}
    ),
    "key agreement: a fake member added": lambda _, openings: openings | {"mallory": openings[_OTHER]},
    "key agreement: a member left out silently": lambda _, openings: {
        member: opening for member, opening in openings.items() if member != _OTHER
    },
    "key agreement: an opening of an earlier epoch replayed": lambda epochs, openings: (
        openings | {_OTHER: epochs.opening(_OTHER, epochs.plan(1))}
    ),
    "key agreement: the keys of two members exchanged": lambda _, openings: (
        openings | {_OTHER: openings["cid"], "cid": openings[_OTHER]}
    ),
    "key agreement: the victim's own key replaced": lambda epochs, openings: (
        openings | {_VICTIM: epochs.opening(_VICTIM, epochs.plan())}
    ),
}


def key_refusals() -> tuple[RefusalResult, ...]:
    """Carry out every attempt against a member's real key agreement and state."""
    found = []
    for words, tamper in _OPENINGS.items():
        epochs = _Epochs()
        sides = {name: epochs.agreement(name) for name in MEMBERS}
        openings = {name: side.opening() for name, side in sides.items()}
        relayed = tamper(epochs, openings)
        found.append(RefusalResult.of(words, "server", partial(sides[_VICTIM].accept_openings, relayed)))
    for words, members in (
        ("an epoch with three members", MEMBERS[:3]),
        ("an epoch with a member outside the roster", (*MEMBERS[:4], "mallory")),
    ):
        attempt = partial(_Epochs().plan, members=members)
        found.append(RefusalResult.of(f"key agreement: {words}", "server", attempt))
    with tempfile.TemporaryDirectory() as place:
        found += _state_refusals(Path(place))
    return tuple(found)


def _state_refusals(place: Path) -> list[RefusalResult]:
    counter = NonceCounter(place / "counter.json", "attempts")
    counter.open_epoch(5)
    state = ClientState(place / "state", "attempts", _VICTIM)
    row = WeightRow(("ben", "cid", "dee"), (2048, 1024, 1024), 12)
    other = WeightRow(("ben", "cid", "dee"), (1024, 2048, 1024), 12)
    try:
        state.accept_row("shared", 1, row)
        attempts: dict[str, Callable[[], object]] = {
            "a second, different row for one round": lambda: state.accept_row("shared", 1, other),
            "an old key epoch opened again": lambda: counter.open_epoch(4),
        }
        return [RefusalResult.of(words, "server", attempt) for words, attempt in attempts.items()]
    finally:
        state.release()
