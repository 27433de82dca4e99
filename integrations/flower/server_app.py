"""The ServerApp: runs the federation's server, and carries its calls over the raw Grid.

The run's configuration names the server's kit in `kit`. Its `node-keys`, as `ada=HEX ben=HEX`, may bind
members to the SHA-256 of their SuperNodes' public keys: no other node is asked, and none calls for another.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmosaic.integrations.flower import pipe
from fedmosaic.integrations.flower.node import Node
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


async def carry(grid: Any, make: Callable[[str], Node], members: dict[str, str], over: asyncio.Event) -> None:
    """Ask all nodes in turn, until `over` is set and what was to be said is delivered.

    `make` is given a member's SPIFFE URI, which is in `members` by the SHA-256 of its node's key. A node that
    fails is forgotten, and what was under way is lost; it is met again if it is still there.
    """
    nodes: dict[int, Node] = {}
    turns: dict[int, asyncio.Task[bytes]] = {}
    asked: dict[str, int] = {}
    looked = 0.0
    while turns or asked or not over.is_set():
        if time.monotonic() - looked > _NODES_SECONDS and not over.is_set():
            looked = time.monotonic()
            for info in await asyncio.to_thread(grid.get_nodes):
                name, key = info.node_id, hashlib.sha256(info.public_key).hexdigest()
                if name not in nodes and (key in members or not members):
                    log.info("SuperNode %d, key %s, carries calls", name, key)
                    nodes[name] = make(members.get(key, ""))
                    await nodes[name].server.start()
                    turns[name] = asyncio.create_task(nodes[name].answer(b""))
        batch = []
        for name in [name for name, turn in turns.items() if turn.done()][:_BATCH]:
            turn = turns.pop(name)
            if (problem := turn.exception()) is not None:
                level = logging.DEBUG if over.is_set() else logging.WARNING  # at the end clients leave
                log.log(level, "SuperNode %d: %s", name, problem)
                await nodes.pop(name).server.stop(None)
            elif len(turn.result()) > pipe.NUMBER_BYTES or not over.is_set():
                record = ConfigRecord({"turn": turn.result(), "idle": not nodes[name].open})
                batch.append(Message(RecordDict({pipe.RECORD: record}), name, "query", ttl=_ANSWER_SECONDS))
        if batch:
            await asyncio.to_thread(grid.push_messages, batch)
            asked |= {message.metadata.message_id: message.metadata.dst_node_id for message in batch}
        for reply in await asyncio.to_thread(grid.pull_messages, list(asked)):
            if (name := asked.pop(reply.metadata.reply_to_message_id, None)) is not None:
                turns[name] = asyncio.create_task(_answered(nodes[name], reply))
        await asyncio.sleep(0.0 if batch else _LOOK_SECONDS)
    await asyncio.gather(*(node.server.stop(None) for node in nodes.values()))


async def _answered(node: Node, reply: Message) -> bytes:
    """The turn that follows on a reply; OSError if there can be none."""
    record = reply.content.config_records.get(pipe.RECORD, {}) if reply.has_content() else {}
    if not isinstance(turn := record.get("turn"), bytes) or len(turn) > pipe.TURN_BYTES:
        raise ConnectionError(repr(reply.error.reason) if reply.has_error() else "no turn came")
    return await node.answer(turn)


async def serve(grid: Any, config: Mapping[str, Any]) -> int:
    """Serve until the run is over, over the Grid and on the server's own port; returns the exit status."""
    status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server, over = Server(str(config["kit"])), asyncio.Event()
    files: Any = server.settings.tls  # without which no server runs
    members: dict[str, str] = {}
    for pair in str(config["node-keys"]).split():
        member, _, key = pair.partition("=")
        digits = len(key) == 64 and set(key) <= set("0123456789abcdef")
        if member not in server.settings.members or key in members or not digits:
            raise ConfigurationError(
                f"node-keys has {pair!r}; write a member of the roster, '=' and the 64 hexadecimal digits "
                "that this log shows for its SuperNode and for no other"
            )
        members[key] = spiffe_id(server.settings.roster.federation, member)

    @asynccontextmanager
    async def beside(service: FederationService) -> AsyncIterator[None]:
        with TemporaryDirectory(prefix="fedmosaic-") as folder:
            work = asyncio.create_task(carry(grid, partial(Node, service, files, folder), members, over))
            work.add_done_callback(lambda _: status.cancel())
            try:
                yield
            finally:
                over.set()
                with suppress(TimeoutError):
                    await asyncio.wait_for(work, _ANSWER_SECONDS)

    async with server.running(status, beside):
        return await status


def main(grid: Grid, context: Context) -> None:
    """Run the server of the kit that the run's configuration names."""
    logging.getLogger("fedmosaic").setLevel(logging.INFO)
    logging.getLogger("fedmosaic").addHandler(logging.StreamHandler())
    if asyncio.run(serve(grid, context.run_config)) == NOTHING_EXCHANGED:
        raise RuntimeError("the run is over and nothing was exchanged; the lines above say why")


app = ServerApp()
app.main()(main)
