"""The server and the clients of a campaign: real processes over mutual TLS, killed where they are told to be.

They are forked from an interpreter that has imported everything, so that kills do not only hit imports. What
a client does before it can be seen outside is noted in a file that survives the kill of its process.
"""

import json
import logging
import os
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

from chaos.faults import changes_disk
from end_to_end import federation_of_vectors as fv
from end_to_end import test_group_sums as sums
from fedmosaic.client.transport import connection
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

    def flushing(file: Any) -> None:
        count()
        flush(file)

    sys.addaudithook(hook)
    os.fsync = flushing


@dataclass
class _Learner(fv.VectorLearner):
    note: Note = lambda *_, **__: None

    def train(self, round_number: int, releases: Any, give_up: Callable[[], None]) -> None:
        private = self.terms.adapter.private
        if private:
            draw = partial(self.note, "draw", round=round_number)
            releases.release_adapter(round_number, EVENT, lambda: None, lambda _: draw())
        super().train(round_number, releases, give_up)
        if private:
            noise = np.random.default_rng([self.seed, round_number, 1]).normal(0, 0.1, self.local.size)
            self.local = (self.local + noise).astype(np.float32)


@dataclass
class _GroupLearner(sums.PullingLearner):
    note: Note = lambda *_, **__: None

    def group_share(self, round_number: int, members: int, releases: Any) -> Any:
        share = super().group_share(round_number, members, releases)
        self.note("draw", round=round_number)
        return share


@dataclass
class _Member(sums.Member):
    target_epsilon: float = 1000.0  # a kill between charge and noise costs a charge, and must refuse none
    note: Note = lambda *_, **__: None

    @property
    def noise(self) -> SeededTestNoise:
        """The same in every process, so that profiles and weights are those of the undisturbed run."""
        return SeededTestNoise(self.seed)

    def make_learner(self, agreed: Terms) -> Any:
        kind = _GroupLearner if agreed.adapter.in_group_sums else _Learner
        return kind(self.seed, agreed, note=self.note)


def take_part(directory: Path, name: str, seed: int, port: int, note: Note) -> int:
    """One client's process, from its start to the end of the run."""
    connection._LONGEST_DELAY_SECONDS = 1.0  # type: ignore[misc]  # a server that is back is soon asked
    transport = fv.dial(directory, name, port)
    session = _Member(directory, name, seed, note=note).session(transport)
    encrypt, push = session._protection._cipher.encrypt, transport.push

    def encrypting(vector: Any, key: Any, context: Any, nonce: bytes) -> bytes:
        record = encrypt(vector, key, context, nonce)
        plain = sha256(np.asarray(vector, "<f4").tobytes()).hexdigest()
        under = "" if key is None else f"{key.fingerprint.hex()} {nonce.hex()}"
        note("encrypt", round=context.round, under=under, plain=plain, record=sha256(record).hexdigest())
        return record

    def pushing(upload: Any) -> Any:
        note("push", round=upload.round, adapter=bool(upload.sections), profile=upload.profile is not None)
        receipt = push(upload)
        note("receipt", round=upload.round, status=receipt.status.value, hash=receipt.content_hash.hex())
        return receipt

    session._protection._cipher.encrypt, transport.push = encrypting, pushing
    session.run()
    return 0


def start(place: Path, name: str, seed: int, port: int, step: int, befall: Callable[[], None]) -> int:
    """Fork the server, or a client, of the federation in `place / "f"`; returns its process id.

    Args:
        place: directory of the run; logs and notes are written there.
        name: "server", or a member.
        seed: of the member's vectors.
        port: of the server.
        step: the durable step at which something befalls it; 0 for none.
        befall: what does.
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
        if step:
            at_step(step, befall)
        if name == "server":
            # Every run of a campaign draws the same members, so that all end alike.
            runs.uuid = SimpleNamespace(uuid4=lambda: UUID(int=0))
            code = guarded(name, lambda: serve(["--kit", str(place / "f" / "server")]))
        else:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
            code = guarded(name, lambda: take_part(place / "f", name, seed, port, note))
    except BaseException:
        logging.exception("the process of %s ended", name)
    finally:
        os._exit(code)
