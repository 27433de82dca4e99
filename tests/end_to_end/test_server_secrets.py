"""A real server process, its disk and all that was sent to it: no key in any of them, and no way to read.

The server runs as a process of its own; the five clients are sessions in this process, over mutual TLS. The
run is held open in its last round, so the server is looked at while it works.
"""

import json
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from end_to_end import federation_of_vectors as fv
from end_to_end.ports import free_port
from end_to_end.test_faults import ENVIRONMENT, PATIENCE
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.privacy.encryption.ciphers import create_cipher
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.protos.errors import CiphertextError, EncryptionError
from fedmosaic.protos.messages import Aggregate, KeyMessage, Receipt, Upload

ROUNDS = 3


class Recorder:
    """One client's line to the server; writes down what goes over it, and waits before the last push."""

    def __init__(self, inner: GrpcTransport, record: list[bytes], arrived: threading.Semaphore) -> None:
        self._inner, self._record, self._arrived = inner, record, arrived
        self.proceed = threading.Event()
        self.aggregates: list[Aggregate] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def post_key_message(self, message: KeyMessage) -> None:
        self._record.append(message.payload)
        self._inner.post_key_message(message)

    def pull(self, round_number: int, on_wait: Any = None) -> Aggregate:
        aggregate = self._inner.pull(round_number, on_wait)
        self.aggregates.append(aggregate)
        self._record += [section.payload for section in aggregate.sections]
        return aggregate

    def push(self, upload: Upload) -> Receipt:
        self._record += [section.payload for section in upload.sections]
        if upload.round == ROUNDS:
            self._arrived.release()
            assert self.proceed.wait(PATIENCE)
        return self._inner.push(upload)


def memory_of(process: int) -> Iterator[bytes]:
    """Every readable and writable region of a stopped process, but for pages that hold nothing but zeros."""
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
        if match is None or line.endswith(("[vvar]", "[vsyscall]")):
            continue
        start, end = (int(edge, 16) for edge in match.groups())
        with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            content = bytearray()
            while len(content) < end - start:
                piece = memory.read(min(1 << 26, end - start - len(content)))
                if not piece:
                    break
                content += piece
        pages = np.frombuffer(content, dtype="<u8").reshape(-1, resource.getpagesize() // 8)
        yield from pages_in_a_row(pages, np.asarray(pages.any(axis=1)))


def pages_in_a_row(pages: np.ndarray, kept: np.ndarray) -> Iterator[bytes]:
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2):
        yield pages[first:last].tobytes()


def forms(secret: bytes) -> list[bytes]:
    """A secret as it may lie in memory: raw, in hexadecimal, and any inner part of it."""
    middle = secret[len(secret) // 2 - 8 : len(secret) // 2 + 8]
    return [secret[:16], middle, secret[-16:], secret.hex().encode()[:32], middle.hex().encode()]


def found_in(contents: list[bytes], wanted: list[bytes]) -> set[bytes]:
    """Those of many byte strings of at least four bytes that lie in any of the contents, in one pass."""
    by_start: dict[bytes, list[bytes]] = {}
    heads, tails = np.zeros((2, 1 << 16), dtype=bool)
    for one in wanted:
        by_start.setdefault(one[:4], []).append(one)
        head, tail = np.frombuffer(one[:4], dtype="<u2")
        heads[head] = tails[tail] = True
    found: set[bytes] = set()
    for content in contents:
        for shift in range(min(2, max(0, len(content) - 3))):
            words = np.frombuffer(content, dtype="<u2", offset=shift, count=(len(content) - shift) // 2)
            starts = np.flatnonzero(heads[words[:-1]])
            for place in 2 * starts[tails[words[starts + 1]]] + shift:
                starting = by_start.get(content[place : place + 4], ())
                found.update(one for one in starting if content.startswith(one, place))
    return found


def secrets_of(directory: Path) -> list[bytes]:
    """What no server may hold: group keys and their sub-keys, and the clients' long-term keys."""
    found = []
    for name in fv.MEMBERS:
        kit = open_kit(directory / "clients" / name)
        found += [kit.signing_key().private_bytes_raw(), (kit.directory / "tls.key").read_bytes()[64:128]]
        for path in (kit.directory / "state" / "keys").glob("epoch-*.json"):
            key = GroupKey.load(json.loads(path.read_text())["key"].encode())
            found.append(key.master)
            if key.ckks_secret:
                found.append(key.ckks_secret[96:480])
    return found


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads a process's memory through /proc")
@pytest.mark.parametrize("backend", ["ckks", "mask"])
def test_server_memory_disk_and_traffic_hold_no_key(tmp_path: Path, backend: str) -> None:
    port = free_port()
    directory = fv.make_federation(tmp_path / "f", fv.terms(backend, ROUNDS))
    place = directory / "server"
    (place / "server.toml").write_text(f'listen = "127.0.0.1:{port}"\nstate_dir = "state"\n')
    command = [sys.executable, "-m", "fedmosaic.server", "--kit", str(place)]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    traffic: list[bytes] = []
    arrived = threading.Semaphore(0)
    clients = {name: fv.Client(directory, name, seed) for seed, name in enumerate(fv.MEMBERS)}
    lines: dict[str, Recorder] = {}
    try:
        for name in clients:
            lines[name] = Recorder(fv.dial(directory, name, port), traffic, arrived)
        sessions: Any = {name: client.session(lines[name]) for name, client in clients.items()}
        errors: dict[str, BaseException] = {}
        runner = threading.Thread(target=lambda: errors.update(fv.run_all(sessions)))
        runner.start()
        for _ in clients:
            assert arrived.acquire(timeout=PATIENCE)

        # All keys of the run exist now, two rounds are summed, and the third is being uploaded.
        server.send_signal(signal.SIGSTOP)  # a region that is given back while it is read is an error
        try:
            memory = list(memory_of(server.pid))
        except PermissionError:
            pytest.skip("this system lets nobody read the memory of another process")
        finally:
            server.send_signal(signal.SIGCONT)
        disk = [path.read_bytes() for path in place.rglob("*") if path.is_file()]
        secrets = secrets_of(directory)
        assert len(secrets) >= 3 * len(clients)
        mine = (place / "tls.key").read_bytes()[64:128]
        wanted = [form for secret in secrets for form in forms(secret)]
        assert found_in(memory, [mine, *wanted]) == {mine}, "the search finds the server's own key alone"
        assert found_in(disk, [traffic[0], *wanted]) == {traffic[0]}, "messages of the agreement are there"
        assert not found_in(traffic, wanted), "a key was sent in the clear"
        _nothing_can_be_read_without_the_key(directory, lines["ada"].aggregates[1], backend)
        for line in lines.values():
            line.proceed.set()
        runner.join(PATIENCE)
        assert errors == {}
    finally:
        for line in lines.values():
            line.proceed.set()
            line.close()
        for client in clients.values():
            client.close()
        server.terminate()
        server.wait(20)


def _nothing_can_be_read_without_the_key(directory: Path, aggregate: Aggregate, backend: str) -> None:
    """With all that the server knows, and a key of its own, the cipher gives nothing."""
    kit = open_kit(directory / "clients" / "ada")
    path = next((kit.directory / "state" / "keys").glob("epoch-*.json"))
    real = GroupKey.load(json.loads(path.read_text())["key"].encode())
    terms = kit.roster.terms
    cipher = create_cipher(terms.encryption, "ada", terms.policy)
    context = RoundContext(kit.roster.federation, 1, 1, "shared", terms.adapter.shared_dimensions)
    (section,) = aggregate.sections
    row = section.row
    assert row is not None
    assert abs(cipher.decrypt(section.payload, real, context, row)).max() > 0.1
    public = {name: getattr(real, name) for name in ("federation", "epoch", "members", "parameters_hash")}
    guess = GroupKey(
        **public,
        transcript=real.transcript,
        fingerprint=real.fingerprint,
        master=bytes(32),
        ckks_secret=bytes(range(1, 7)) * (len(real.ckks_secret) // 6),
    )
    with pytest.raises((CiphertextError, EncryptionError)):
        cipher.decrypt(section.payload, guess, context, row)
