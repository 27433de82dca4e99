"""The server and the clients of a campaign: real processes over mutual TLS, killed where they are told to be.

They are forked from an interpreter that has imported everything, so that kills do not only hit imports. What
a client does before it can be seen outside is noted in a file that survives the kill of its process.
"""

import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np

from chaos.disk import Disk
from chaos.faults import STEPS, changes_disk, kill
from end_to_end import federation_of_vectors as fv
from end_to_end import test_group_sums as sums
from fedmosaic.client.round.records import digest_of
from fedmosaic.client.transport import connection
from fedmosaic.client.witness import WitnessSettings
from fedmosaic.client.witness import run as witness
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.mechanism.noise import SeededTestNoise
from fedmosaic.privacy.terminal import guarded
from fedmosaic.server import run as runs
from fedmosaic.server.__main__ import main as serve

Note = Callable[..., None]
EVENT = GaussianEvent(4.0, 0.1, 1)
"""What a round of the vectors' DP-SGD is charged as."""


def notebook(path: Path) -> Note:
    """A function that appends a line of JSON to a file."""
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)

    def note(what: str, **fields: object) -> None:
        os.write(file, json.dumps({"what": what, **fields}).encode() + b"\n")

    return note


def at_step(step: int, befall: Callable[[], None]) -> None:
    """Have something befall this process at its n-th durable step: a file opened to write, an fsync."""
    left, flush = step, os.fsync

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            befall()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changes_disk(event, arguments):
            count()

    def flushing(fd: Any) -> None:
        count()
        flush(fd)

    sys.addaudithook(hook)
    os.fsync = flushing


class _Noise(SeededTestNoise):
    """The same in every process, so that runs are alike; tells before it draws of which channel."""

    def __init__(self, seed: int, drawing: Callable[[str], None], terms: Terms) -> None:
        super().__init__(seed)
        self._drawing = drawing
        self._channels = {terms.profile.dimensions: "profile", terms.adapter.shared_dimensions: "adapter"}

    def gaussian(self, size: int, standard_deviation: float) -> Any:
        self._drawing(self._channels[size])
        return super().gaussian(size, standard_deviation)


@dataclass
class _Learner(fv.VectorLearner):
    drawing: Callable[[str], None] = lambda _: None

    def train(self, round_number: int, releases: Any, give_up: Callable[[], None]) -> None:
        private = self.terms.adapter.private
        if private:

            def noise_is_drawn(_: None) -> bool:
                self.drawing("adapter")
                return True

            releases.release_adapter(round_number, EVENT, lambda: None, noise_is_drawn)
        super().train(round_number, releases, give_up)
        if private:
            noise = np.random.default_rng([self.seed, round_number, 1]).normal(0, 0.1, self.local.size)
            self.local = (self.local + noise).astype(np.float32)


@dataclass
class _FamilyLearner(_Learner):
    """Shares a part of its vector with its family besides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ((self.family, self.length),) = self.terms.adapter.family_dimensions.items()

    def sections(self) -> Any:
        return {**super().sections(), "family": -self.local[: self.length]}

    def load_global(self, section: str, vector: np.ndarray) -> None:
        if section == "shared":
            super().load_global(section, vector)
        else:
            self.global_branch[: self.length] += vector.astype(np.float32)

    def keep_own(self, section: str) -> None:
        if section == "shared":
            super().keep_own(section)


@dataclass
class _Member(sums.Member):
    target_epsilon: float = 1000.0  # a kill between charge and noise costs a charge, and must refuse none
    note: Note = lambda *_, **__: None

    @property
    def noise(self) -> SeededTestNoise:
        """Noise that is noted."""
        return _Noise(self.seed, self._drawing, self.learner.terms)

    def _drawing(self, channel: str) -> None:
        rows = self.ledger.export() if self.ledger else ()
        charged = sum((row.kind, row.channel) == ("RESERVED", channel) for row in rows)
        self.note("draw", channel=channel, charged=charged)

    def make_learner(self, agreed: Terms) -> Any:
        if agreed.adapter.in_group_sums:
            return sums.PullingLearner(self.seed, agreed)
        kind = _FamilyLearner if agreed.adapter.family_dimensions else _Learner
        return kind(self.seed, agreed, drawing=self._drawing)


def take_part(directory: Path, name: str, seed: int, port: int, note: Note) -> int:
    """One client's process, from its start to the end of the run."""
    connection._LONGEST_DELAY_SECONDS = 1.0  # type: ignore[misc]  # a server that is back is soon asked
    transport = fv.dial(directory, name, port)
    session = _Member(directory, name, seed, note=note).session(transport)
    encrypt, push, post = session._protection._cipher.encrypt, transport.push, transport.post_key_message

    def encrypting(vector: Any, key: Any, context: Any, nonce: bytes) -> bytes:
        record = encrypt(vector, key, context, nonce)
        under = "" if key is None else f"{key.fingerprint.hex()} {nonce.hex()}"
        about = {"round": context.round, "section": context.section, "under": under}
        note("encrypt", **about, plain=digest_of(vector), record=_hash(record))
        return record

    def pushing(upload: Any) -> Any:
        sent = {section.name: _hash(section.payload) for section in upload.sections}
        profile = "" if upload.profile is None else digest_of(upload.profile.vector)
        note("push", round=upload.round, epoch=upload.key_epoch, sent=sent, profile=profile)
        receipt = push(upload)
        note("receipt", round=upload.round, status=receipt.status.value, hash=receipt.content_hash.hex())
        return receipt

    def posting(message: Any) -> None:
        place = f"{message.epoch} {message.stage} {message.recipient}"
        note("post", place=place, number=message.epoch, stage=message.stage, sent=_hash(message.payload))
        post(message)

    session._protection._cipher.encrypt = encrypting  # type: ignore[method-assign]  # noted
    transport.push = pushing  # type: ignore[method-assign]  # noted
    transport.post_key_message = posting  # type: ignore[method-assign]  # noted
    session.run()
    return 0


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()


def countersign(directory: Path, name: str, port: int) -> int:
    """The witness's process."""
    kit = directory / "clients" / name
    _, refused = witness(
        WitnessSettings(kit=kit, server=f"localhost:{port}", state_dir=kit / "state", retry_seconds=300)
    )
    return 3 if refused else 0


def home(place: Path, name: str) -> Path:
    """The folder of a server, a member or a witness, in which its state stands."""
    return place / "f" / ("server" if name == "server" else f"clients/{name}")


def start(
    place: Path, name: str, seed: int | None, port: int, step: int, fault: str, draw: random.Random
) -> int:
    """Fork the server, a client or the witness of the federation in `place / "f"`; returns its process id.

    Args:
        place: directory of the run; logs and notes are written there.
        name: "server", a member or the witness.
        seed: of the member's vectors; None for the others.
        port: of the server.
        step: the durable step at which something befalls it; 0 for none.
        fault: what does, of `faults.FAULTS`.
        draw: of the fault's moments.
    """
    if process := os.fork():
        return process
    code = 70
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # that of the process that it is forked from is not its own
    try:
        log = os.open(place / f"{name}.log", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        note = notebook(place / f"{name}.notes")
        if step and fault == "power-cut":
            at_step(step, Disk(home(place, name), place / f"{name}.disk").cut)
        elif step:
            at_step(step, partial(STEPS.get(fault, kill), draw))
        if name == "server":
            # Every run of a campaign draws the same members, so that all end alike.
            runs.uuid = SimpleNamespace(uuid4=lambda: UUID(int=0))  # type: ignore[attr-defined, assignment]
            code = guarded(name, lambda: serve(["--kit", str(place / "f" / "server")]))
        else:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
            there = place / "f", name
            code = guarded(
                name,
                lambda: countersign(*there, port) if seed is None else take_part(*there, seed, port, note),
            )
    except BaseException:
        logging.exception("the process of %s ended", name)
    finally:
        os._exit(code)
