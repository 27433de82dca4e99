"""A server of `grpc.aio` alone, for `benchmarks.waiting`: what gRPC itself takes where so many wait.

`python -m benchmarks.waiting_bare KIT PORT FILE` sends the messages of the file, each after its length in
four bytes, to everybody who waits in `Pull`, once `RoundStatus` is called. It decides and stores nothing.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from fedmosaic.protos.v1 import federation_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["Federation"].full_name


class _Bare:
    def __init__(self, answer: Sequence[bytes]) -> None:
        self._answer, self._open = answer, asyncio.Event()

    async def pull(self, _requests: object, context: Any) -> bytes:
        request = pb.PullRequest.FromString(await context.read())
        waiting = pb.PullResponse(waiting=pb.RoundState(round=request.round))
        await context.write(waiting.SerializeToString())
        await self._open.wait()
        for message in self._answer[:-1]:
            await context.write(message)
        return self._answer[-1]

    async def open(self, _request: bytes, _context: object) -> bytes:
        self._open.set()
        self._open = asyncio.Event()
        return b""


async def serve(kit: Path, port: int, file: Path) -> None:
    """Serve until the process is ended."""
    content, answer = file.read_bytes(), []
    while content:
        end = 4 + int.from_bytes(content[:4], "big")
        answer.append(content[4:end])
        content = content[end:]
    server, bare = aio.server(), _Bare(answer)
    methods: dict[str, Any] = {
        "Pull": grpc.stream_unary_rpc_method_handler(bare.pull),
        "RoundStatus": grpc.unary_unary_rpc_method_handler(bare.open),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    authority, key, certificate = (
        (kit / name).read_bytes() for name in ("authority.pem", "tls.key", "tls.pem")
    )
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
