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
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmosaic.integrations.flower.node import Node, methods_of
from fedmosaic.integrations.flower.secured import RECORD, tls_context
from fedmosaic.privacy.federation.identity import spiffe_id
from fedmosaic.protos.errors import NOTHING_EXCHANGED
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
    """The pipes to all nodes, and what is under way to each."""

    def __init__(
        self, grid: Any, context: ssl.SSLContext, methods: Mapping[str, Any], members: Mapping[str, str]
    ) -> None:
        """Prepare; `members` are SPIFFE URIs by SHA-256 of the only nodes to ask, empty for all."""
        self._grid, self._tls, self._methods, self._members = grid, context, methods, members
        self._nodes: dict[int, Node] = {}
        self._to_say: list[tuple[int, bytes]] = []
        self._asked: dict[str, tuple[int, bytes]] = {}
        self._thinking: set[asyncio.Task[None]] = set()
        self._looked = 0.0
        self.until = float("inf")

    async def run(self) -> None:
        """Carry, at the end until the last answers are delivered or `until`, in seconds of this clock."""
        while (now := time.monotonic()) < self.until:
            last = self.until < float("inf")
            if last and not self._thinking and not any(said for _, said in self._to_say):
                if not any(said for _, said in self._asked.values()):
                    return
            elif not last and now - self._looked > _NODES_SECONDS:
                self._looked = now
                await self._meet()
            await self._push()
            ids = list(self._asked)
            for reply in await asyncio.to_thread(self._grid.pull_messages, ids) if ids else ():
                node, _ = self._asked.pop(reply.metadata.reply_to_message_id)
                task = asyncio.create_task(self._think(node, reply))
                self._thinking.add(task)
                task.add_done_callback(self._thinking.discard)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _meet(self) -> None:
        for info in await asyncio.to_thread(self._grid.get_nodes):
            key = hashlib.sha256(info.public_key).hexdigest()
            if info.node_id not in self._nodes and (not self._members or key in self._members):
                log.info("SuperNode %d, key %s, carries calls", info.node_id, key)
                member = self._members.get(key, "")
                self._nodes[info.node_id] = Node(self._tls, self._methods, str(info.node_id), member)
                self._to_say.append((info.node_id, b""))

    async def _push(self) -> None:
        while batch := self._to_say[:_BATCH]:
            del self._to_say[:_BATCH]
            records = [RecordDict({RECORD: ConfigRecord({RECORD: said})}) for _, said in batch]
            messages = [
                Message(record, node, "query", ttl=_ANSWER_SECONDS)
                for record, (node, _) in zip(records, batch, strict=True)
            ]
            await asyncio.to_thread(self._grid.push_messages, messages)
            ids = [message.metadata.message_id for message in messages]
            self._asked |= dict(zip(ids, batch, strict=True))

    async def _think(self, node: int, reply: Any) -> None:
        """Answer what a node has brought; an error means that what was under way is lost."""
        said = b""
        if reply.has_content():
            said = await self._nodes[node].answer(bytes(reply.content.config_records[RECORD][RECORD]))
        else:
            log.warning("SuperNode %d: %s", node, reply.error.reason)
            await self._nodes[node].close()
            await asyncio.sleep(_NODES_SECONDS)
        self._to_say.append((node, said))


async def serve(server: Server, grid: Any, node_keys: Mapping[str, str]) -> int:
    """Serve until the run is over, over the Grid and on the server's own port; returns the exit status."""
    over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    federation, tls = server.settings.federation, server.settings.tls
    members = {key: spiffe_id(federation, member) for member, key in node_keys.items()}

    @asynccontextmanager
    async def beside(service: FederationService) -> AsyncIterator[None]:
        files: Any = tls  # without which no server runs
        context = tls_context(ssl.PROTOCOL_TLS_SERVER, files.authority, files.certificate, files.private_key)
        post = Post(grid, context, await methods_of(service), members)
        work = asyncio.create_task(post.run())
        work.add_done_callback(lambda done: None if over.done() else over.cancel())
        try:
            yield
        finally:
            post.until = time.monotonic() + _FAREWELL_SECONDS
            await work

    async with server.running(over, beside):
        return await over


def main(grid: Grid, context: Context) -> None:
    """Run the server of the kit that the run's configuration names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", force=True)
    config = context.run_config
    keys = dict(pair.split("=") for pair in str(config["node-keys"]).split())
    if asyncio.run(serve(Server(str(config["kit"])), grid, keys)) == NOTHING_EXCHANGED:
        raise RuntimeError("the run is over and nothing was exchanged; the lines above say why")


app = ServerApp()
app.main()(main)
