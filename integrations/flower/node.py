"""The server's end of the pipe to one SuperNode: a gRPC server of its own, and a connection to it."""

import asyncio
import secrets
import time

from grpc import aio

from fedmosaic.integrations.flower import pipe
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.network.peers import Context, Gate, refuse
from fedmosaic.server.network.service import FederationService
from fedmosaic.server.network.serving import server_credentials
from fedmosaic.server.settings import TlsFiles


class Node(Gate):
    """One SuperNode, and the gate of its server, which may let through one member alone."""

    def __init__(self, service: FederationService, tls: TlsFiles, folder: str, member: str) -> None:
        """Prepare to listen at a Unix socket, in a folder for this user alone.

        `member` is the SPIFFE URI of the only one whose calls the node may carry; empty: any member's.
        """
        super().__init__(service.audit)
        self._socket, self._member = f"{folder}/{secrets.token_hex(8)}", member
        self.server = aio.server(interceptors=(self,), options=pipe.OPTIONS)
        rpc.add_FederationServicer_to_server(service, self.server)
        self.server.add_secure_port(f"unix:{self._socket}", server_credentials(tls))
        self._number = b""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def admit(self, context: Context) -> str:
        """As of every gate, but for whose call it is."""
        who = await super().admit(context)
        if self._member and who != self._member:
            message = "this SuperNode is another member's"
            remedy = "name this client's socket in its own SuperNode's configuration, or mend node-keys"
            refusal = Refusal(RefusalKind.UNAUTHENTICATED, "WRONG_NODE", message, remedy)
            await refuse(context, self.audit, "a call", who, refusal)
        return who

    async def answer(self, turn: bytes) -> bytes:
        """Give gRPC what the client said, if anything, and gather the turn that answers it; maybe OSError."""
        if turn[: pipe.NUMBER_BYTES] not in (b"", self._number):
            self._hang_up()
            self._streams = await asyncio.open_unix_connection(self._socket, limit=pipe.TURN_BYTES)
            self._number = turn[: pipe.NUMBER_BYTES]
        if self._streams is None:
            return b""
        reader, writer = self._streams
        writer.write(turn[pipe.NUMBER_BYTES :])
        said, until = bytearray(self._number), time.monotonic() + pipe.HOLD_SECONDS
        while room := pipe.TURN_BYTES - len(said):
            seconds = pipe.QUIET_SECONDS if len(said) > pipe.NUMBER_BYTES else pipe.BRIEF_SECONDS
            try:
                piece = await asyncio.wait_for(reader.read(room), seconds)
            except TimeoutError:
                if self.open and len(turn) < pipe.TURN_BYTES and time.monotonic() < until:
                    continue  # it will be answered; after the longest turn there is more to be heard first
                break
            if not piece:
                self._hang_up()
                return bytes(said) if len(said) > pipe.NUMBER_BYTES else b""
            said += piece
        return bytes(said)

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None  # the number stays: what else is said under it is for nobody
