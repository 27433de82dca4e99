"""The ServerApp: runs the federation's server, and carries its calls over the raw Grid.

The run's configuration names the server's kit in `kit` and, where SuperNodes are authenticated, may bind them
in `node-keys`: `ada=HEX ben=HEX`, the SHA-256 of each member's SuperNode's public key. Then no other node is
asked, and none may bring another member's calls.
"""

import asyncio
import hashlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmosaic.integrations.flower.node import Node, methods_of
from fedmosaic.integrations.flower.secured import RECORD, TURN_BYTES, tls_context
from fedmosaic.privacy.federation.identity import spiffe_id
from fedmosaic.protos.errors import NOTHING_EXCHANGED, ConfigurationError
from fedmosaic.server.network.service import FederationService
from fedmosaic.server.server import Server

log = logging.getLogger(__name__)
_BATCH: Final = 4
"""Messages in one push, which Flower holds in memory: at most 32 MiB."""
_LOOK_SECONDS: Final = 0.2
_NODES_SECONDS: Final = 3.0
_ANSWER_SECONDS: Final = 120.0
"""After so long without an answer, Flower gives an error for it."""
_FAREWELL_SECONDS: Final = 60.0


class Post:
    """The messages to all nodes, and their replies."""

    def __init__(self, grid: Any, pipe: Callable[[str, str], Node], members: Mapping[str, str]) -> None:
        """`pipe` makes a `Node` of its name and its member, which is in `members` by SHA-256 of its key."""
        self._grid, self._pipe, self._members = grid, pipe, members
        self._nodes: dict[int, asyncio.Task[None]] = {}
        self._to_push: list[tuple[Message, asyncio.Future[Any]]] = []
        self._asked: dict[str, asyncio.Future[Any]] = {}
        self.leaving = False

    async def carry(self) -> None:
        """Carry until `leaving` is set and what was to be said is delivered."""
        looked = 0.0
        while not self.leaving or not all(task.done() for task in self._nodes.values()):
            if not self.leaving and time.monotonic() - looked > _NODES_SECONDS:
                looked = time.monotonic()
                self._meet(await asyncio.to_thread(self._grid.get_nodes))
            while batch := self._to_push[:_BATCH]:
                del self._to_push[:_BATCH]
                await asyncio.to_thread(self._grid.push_messages, [message for message, _ in batch])
                self._asked |= {message.metadata.message_id: reply for message, reply in batch}
            ids = list(self._asked)
            for reply in await asyncio.to_thread(self._grid.pull_messages, ids) if ids else ():
                if asked := self._asked.pop(reply.metadata.reply_to_message_id, None):
                    asked.set_result(reply)
            await asyncio.sleep(_LOOK_SECONDS)

    def _meet(self, found: Any) -> None:
        for info in found:
            key = hashlib.sha256(info.public_key).hexdigest()
            if info.node_id not in self._nodes and (not self._members or key in self._members):
                log.info("SuperNode %d, key %s, carries calls", info.node_id, key)
                pipe = self._pipe(str(info.node_id), self._members.get(key, ""))
                self._nodes[info.node_id] = asyncio.create_task(self._talk(info.node_id, pipe))

    async def _talk(self, node: int, pipe: Node) -> None:
        """Ask a node in turn; an error means that what was under way is lost."""
        said = b""
        while said or not self.leaving:
            content = RecordDict({RECORD: ConfigRecord({RECORD: said})})
            asked = asyncio.get_running_loop().create_future()
            self._to_push.append((Message(content, node, "query", ttl=_ANSWER_SECONDS), asked))
            reply = await asked
            record = reply.content.config_records.get(RECORD, {}) if reply.has_content() else {}
            heard = record.get(RECORD)
            if isinstance(heard, bytes) and len(heard) <= TURN_BYTES:
                said = await pipe.answer(heard)
                continue
            log.warning("SuperNode %d: %r", node, reply.error.reason if reply.has_error() else "no records")
            await pipe.close()
            await asyncio.sleep(_NODES_SECONDS)
            said = b""


async def serve(server: Server, grid: Any, node_keys: Mapping[str, str]) -> int:
    """Serve until the run is over, over the Grid and on the server's own port; returns the exit status."""
    over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    files: Any = server.settings.tls  # without which no server runs
    for member, key in node_keys.items():
        if member not in server.settings.members or len(key) != 64:
            raise ConfigurationError(
                f"node-keys has {member!r} with {key!r}; write a member of the roster, '=' and the 64 "
                "hexadecimal digits that this log shows for its SuperNode"
            )
    members = {key: spiffe_id(server.settings.roster.federation, member) for member, key in node_keys.items()}

    @asynccontextmanager
    async def beside(service: FederationService) -> AsyncIterator[None]:
        tls = tls_context(ssl.PROTOCOL_TLS_SERVER, files.authority, files.certificate, files.private_key)
        post = Post(grid, partial(Node, tls, await methods_of(service)), members)
        work = asyncio.create_task(post.carry())
        work.add_done_callback(lambda _: over.cancel())
        try:
            yield
        finally:
            post.leaving = True
            with suppress(TimeoutError):
                await asyncio.wait_for(work, _FAREWELL_SECONDS)

    async with server.running(over, beside):
        return await over


def main(grid: Grid, context: Context) -> None:
    """Run the server of the kit that the run's configuration names."""
    logging.getLogger("fedmosaic").setLevel(logging.INFO)
    logging.getLogger("fedmosaic").addHandler(logging.StreamHandler())
    config = context.run_config
    pairs = [pair.partition("=") for pair in str(config["node-keys"]).split()]
    keys = {member: key for member, _, key in pairs}
    if asyncio.run(serve(Server(str(config["kit"])), grid, keys)) == NOTHING_EXCHANGED:
        raise RuntimeError("the run is over and nothing was exchanged; the lines above say why")


app = ServerApp()
app.main()(main)
