"""What a secure sum costs: bytes up and a processor's seconds of a member and of the server.

    python -m benchmarks.secure_sums --members 10 100 1000 --dimensions 2160 30464 --flower

One member is real, and all of the server; what the others send, whose time is not measured, is made up, so
that 1,000 of them fit one process. A plain sum is what the server does with vectors that nobody masks: read m
messages off the wire's format and add them. Neither side counts TLS or gRPC. The least of `repeats` runs.

Beside it Flower's SecAgg+, if `flwr` is installed: its own workflow and its own client functions in this
process, every client a neighbour of every other, two thirds of the shares to open a secret.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import tyro
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.secure_sums_flower import flower_seconds
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.privacy.secureaggregation.masks import agree, private_key, unpack
from fedmosaic.privacy.secureaggregation.member import SumMember
from fedmosaic.privacy.secureaggregation.messages import (
    ENVELOPE_BYTES,
    Opening,
    Unmasking,
    open_shares,
    seal_shares,
    seed_check,
    sign_opening,
    survivors_digest,
    transcript,
)
from fedmosaic.privacy.secureaggregation.terms import SumTerms
from fedmosaic.protos import wire
from fedmosaic.protos.messages import KeyMessage
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.server.round.sums import AGREE, OPEN, SHARE, STEPS, UNMASK, VECTOR, RoundSums

_SECRET = 7
"""Of every made-up member; its polynomial is constant, so every share is the secret too."""


@dataclass(frozen=True)
class Settings:
    """Print the cost of a secure sum as a Markdown table."""

    members: tuple[int, ...] = (10, 100, 1000)
    dimensions: tuple[int, ...] = (2160, 30464)
    vanished: tuple[int, ...] = (0, 3)
    repeats: int = 3
    flower: bool = False
    """Also run Flower's SecAgg+, with up to 100 members."""


class Sum:
    """One secure sum of m members: the first is real, the last ones vanish before their vectors."""

    def __init__(self, count: int, dimensions: int, vanished: int) -> None:
        self.names = [f"m{number:04}" for number in range(count)]
        self.identities = {name: Ed25519PrivateKey.generate() for name in self.names}
        keys = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        colluders = max(1, (count - 2) // 3)
        minimum = (count + colluders) // 2 + 1
        self.terms = SumTerms(bytes(32), tuple(self.names), keys, minimum, colluders, dimensions)
        self.contributors = self.names[: count - vanished]
        self.sums = RoundSums(2, [self.terms], dict.fromkeys(STEPS, 1.0), 0.0)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes_up, self.vector = 0, os.urandom(4 * dimensions)

    @contextmanager
    def clock(self, who: str) -> Iterator[None]:
        """Count the processor's seconds of what happens inside."""
        started = time.process_time()
        yield
        self.seconds[who] += time.process_time() - started

    def post(self, step: str, made: Callable[[str], bytes], names: list[str]) -> None:
        """Every member's message as it comes off the wire; time passes where one did not come."""
        sent = {name: _on_the_wire(step, made(name)) for name in names}
        self.bytes_up += len(_read(sent[self.names[0]]).payload)
        working = "server" if step != UNMASK else "unmask"
        for name, data in sent.items():
            with self.clock("reading"):
                payload = _read(data).payload
            with self.clock(working):
                self.sums.post(name, step, payload)
                self.sums.advance(self.names, 0.0)
        with self.clock(working):
            if not self.sums.read(self.names[0], step):
                self.sums.advance(self.names, 10.0)
            for unmask in self.sums.due():
                unmask()
            for name in names:
                self.sums.read(name, step)

    def run(self) -> dict[str, float]:
        """Seconds of member and server."""
        first, terms = self.names[0], self.terms
        digest, envelope_keys = terms.digest, {n: X25519PrivateKey.generate() for n in self.names}
        with self.clock("member"):
            member = SumMember(terms, first, self.identities[first])
            opening = member.open()
        mask_key = private_key(_SECRET, digest).public_key().public_bytes_raw()

        def opened(name: str) -> bytes:
            if name == first:
                return opening.encoded()
            envelope_key = envelope_keys[name].public_key().public_bytes_raw()
            content = (mask_key, envelope_key, seed_check(digest, name, _SECRET))
            return sign_opening(terms, name, content, self.identities[name]).encoded()

        self.post(OPEN, opened, self.names)
        told = {name: Opening.decoded(data) for name, data in self.sums.read(first, OPEN).items()}
        with self.clock("member"):
            sealed = member.share(told)
        said, pair = transcript(terms, told), (_SECRET, _SECRET)

        def shared(name: str) -> bytes:
            if name == first:
                return b"".join(sealed[other] for other in sorted(sealed))
            agreed = agree(envelope_keys[name], told[first].envelope_key)
            rest = bytes(ENVELOPE_BYTES) * (len(self.names) - 1)
            return seal_shares(agreed, said, name, first, pair) + rest

        self.post(SHARE, shared, self.names)
        envelopes = self.sums.read(first, SHARE)
        with self.clock("member"):
            member.accept(envelopes)
            masked = member.mask(np.arange(terms.dimensions))
        self.post(VECTOR, lambda name: masked if name == first else self.vector, self.contributors)
        with self.clock("member"):
            signature = member.agree(self.contributors)
        listed = survivors_digest(said, self.contributors)
        signed = {name: self.identities[name].sign(listed) for name in self.contributors} | {first: signature}
        self.post(AGREE, signed.__getitem__, self.contributors)
        with self.clock("member"):
            unmasking = member.unmask(self.sums.read(first, AGREE))

        def unmasked(name: str) -> bytes:
            if name == first:
                return unmasking.encoded()
            agreed = agree(envelope_keys[name], told[first].envelope_key)
            held = open_shares(agreed, said, first, name, sealed[name])
            return Unmasking(dict.fromkeys(told, _SECRET) | {first: held and held[0]}).encoded()

        self.post(UNMASK, unmasked, self.contributors)
        if not self.sums.totals().vectors[0]:
            raise AssertionError("no sum was formed")
        sent = [_on_the_wire(VECTOR, self.vector) for _ in self.contributors]  # each in a place of its own
        total = np.zeros(terms.dimensions, dtype=np.uint32)
        with self.clock("plain"):
            for data in sent:
                total += unpack(_read(data).payload, terms.dimensions, terms.bits)
        return self.seconds


def _on_the_wire(step: str, payload: bytes) -> bytes:
    return wire.encode(KeyMessage(2, step, "", payload), pb.PostKeyMessageRequest).SerializeToString()


def _read(data: bytes) -> KeyMessage:
    return wire.decode(pb.PostKeyMessageRequest.FromString(data), KeyMessage)


def main() -> None:
    """Print the table."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = []
    for count, dimensions, vanished in product(settings.members, settings.dimensions, settings.vanished):
        runs = []
        for _ in range(settings.repeats if count <= 100 else 1):
            one = Sum(count, dimensions, vanished)
            runs.append(one.run())
        least = {who: min(run[who] for run in runs) for who in runs[0]}
        least["server"] += least["unmask"] + least["reading"]
        flower = ["–"] * 3
        if settings.flower and count <= 100:
            member, server, up = flower_seconds(count, dimensions, vanished)
            flower = [f"{up:,}", f"{1e3 * member:,.1f}", f"{1e3 * server:,.1f}"]
        rows.append(
            [f"{count:,}", f"{dimensions:,}", str(vanished), f"{one.bytes_up:,}"]
            + [f"{one.bytes_up / (4 * dimensions):.2f}"]
            + [f"{1e3 * least[who]:,.1f}" for who in ("member", "server", "reading", "unmask", "plain")]
            + [f"{least['server'] / least['plain']:.0f}", *flower]
        )
        print(rows[-1], flush=True)
    heads = ["m", "D", "vanished", "bytes up", "÷ 4·D", "member ms"]
    heads += ["server ms", "of it reading", "of it unmasking", "plain ms", "÷"]
    heads += ["SecAgg+ bytes up", "SecAgg+ member ms", "SecAgg+ server ms"]
    print("\n".join(markdown_table(heads, rows)))


if __name__ == "__main__":
    main()
