"""A server of `grpc.aio` alone, for `benchmarks.waiting`: what gRPC itself takes where so many wait.

`python -m benchmarks.waiting_bare KIT PORT FILE` sends the messages of the file, each after its length in
four bytes, to everybody who waits in `Pull`, once `RoundStatus` is called. It decides and stores nothing.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server


class _Bare(FederationServicer):
    def __init__(self, answer: Sequence[pb.PullResponse]) -> None:
        self._answer, self._open = answer, asyncio.Event()

    async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[pb.PullResponse]:
        yield pb.PullResponse(waiting=pb.RoundState(round=request.round))
        await self._open.wait()
        for message in self._answer:
            yield message

    async def RoundStatus(self, request: pb.RoundStatusRequest, context: Any) -> pb.RoundStatusResponse:
        self._open.set()
        self._open = asyncio.Event()
        return pb.RoundStatusResponse()


async def serve(kit: Path, port: int, file: Path) -> None:
    """Serve until the process is ended."""
    content, answer = file.read_bytes(), []
    while content:
        end = 4 + int.from_bytes(content[:4], "big")
        answer.append(pb.PullResponse.FromString(content[4:end]))
        content = content[end:]
    server = aio.server()
    add_FederationServicer_to_server(_Bare(answer), server)  # type: ignore[abstract]  # only two are called
    authority, key, certificate = (
        (kit / name).read_bytes() for name in ("authority.pem", "tls.key", "tls.pem")
    )
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
