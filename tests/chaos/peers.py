"""Peers that mean harm, in a process beside a run: half-open, slow, flooding, and with garbage."""

import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_METHODS = ("Enrol", "Pull", "UploadStatus", "RoundStatus", "Report", "PostKeyMessage", "ReadKeyMessages")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HELLO = bytes.fromhex("1603010200010001fc0303")
"""How a handshake of TLS begins, announcing more than ever comes."""


def torment(place: Path, member: str, port: int, draw: random.Random) -> int:
    """Fork a process that does all of it until it is killed; returns its process id.

    Without a certificate it opens connections, and says nothing, little, or garbage. With that of a member it
    floods, with half of the calls that one may have open: what that member does itself has to go on.
    """
    seeds = [draw.random() for _ in range(4)]
    if process := os.fork():
        return process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(place / "peers.log", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.getLogger().addHandler(logging.NullHandler())
    kinds = (_half_open, _slow, _garbage, lambda *given: _flood(place / "f" / "clients" / member, *given))
    for kind, seed in zip(kinds, seeds, strict=True):
        threading.Thread(target=_for_ever, args=(kind, port, random.Random(seed)), daemon=True).start()
    while True:
        signal.pause()


def _for_ever(kind: Callable[[int, random.Random], None], port: int, draw: random.Random) -> None:
    while True:
        with suppress(OSError):
            kind(port, draw)
        time.sleep(0.1)


def _half_open(port: int, draw: random.Random) -> None:
    held = []
    with suppress(OSError):
        for _ in range(50):
            held.append(socket.create_connection(("127.0.0.1", port)))
            if draw.random() < 0.5:
                held[-1].sendall(_HELLO)
    time.sleep(draw.uniform(1, 12))
    for peer in held:
        peer.close()


def _slow(port: int, draw: random.Random) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        for value in _HELLO + draw.randbytes(200):
            peer.sendall(bytes([value]))
            time.sleep(0.1)


def _garbage(port: int, draw: random.Random) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(draw.choice((_PREFACE, _HELLO, b"")) + draw.randbytes(1 << 16))


def _flood(kit: Path, port: int, draw: random.Random) -> None:
    import grpc

    from fedmosaic.client.transport.connection import open_channel

    files = kit / "authority.pem", kit / "tls.pem", kit / "tls.key"
    with open_channel(f"localhost:{port}", *files) as channel:
        silent: list[grpc.UnaryUnaryMultiCallable[bytes, bytes]] = [
            channel.unary_unary("/fedmosaic.v1.Federation/Pull") for _ in range(2)
        ]
        calls = [method.future(b"", timeout=60) for method in silent]  # round 0: answered with a refusal
        for _ in range(200):
            path = f"/fedmosaic.v1.Federation/{draw.choice(_METHODS)}"
            asking: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            answer = asking(draw.randbytes(draw.choice((0, 8, 1 << 16))), timeout=0.5)
            with suppress(grpc.RpcError):
                if draw.random() < 0.5:
                    answer.cancel()
                list(answer)
        pushing: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
            "/fedmosaic.v1.Federation/Push"
        )
        for _ in range(3):
            with suppress(grpc.RpcError):
                pushing(iter([draw.randbytes(100)]), timeout=0.5)
        for call in calls:
            call.cancel()
