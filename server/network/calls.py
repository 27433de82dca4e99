"""What every service of the server does around a call: who calls, and how errors are answered."""

import logging
from collections.abc import Awaitable
from typing import Final, NoReturn, TypeVar

import grpc

from fedmosaic.protos import bounds
from fedmosaic.protos.errors import FedMosaicError, WireError
from fedmosaic.protos.refusal import Refusal
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.network.peers import Context, identify, malformed, note_refusal, refuse
from fedmosaic.server.network.waiting import Changes

log = logging.getLogger(__name__)
CHUNK_SECONDS: Final = 30.0
"""How long the server waits for the next message of an upload."""
T = TypeVar("T")


def wait_seconds(milliseconds: int) -> float:
    """How long a call may wait that asked for so much."""
    return min(milliseconds, bounds.MAX_WAIT_MILLISECONDS) / 1000.0


class Calls:
    """Base of a service."""

    def __init__(self, coordinator: Coordinator, changes: Changes) -> None:
        self._coordinator = coordinator
        self._changes = changes
        self.audit = coordinator.audit

    async def _identify(self, context: Context, call: str, *, witness: bool = False) -> str:
        try:
            return identify(context.auth_context(), self._coordinator.settings, witness=witness)
        except Refusal as refusal:
            await self._refuse(context, call, context.peer() or "unknown peer", refusal)

    async def _refuse(self, context: Context, call: str, who: str, refusal: Refusal) -> NoReturn:
        note_refusal(self.audit, who, call, refusal.reason)
        await refuse(context, call, who, refusal)

    async def _guarded(self, context: Context, call: str, client: str, work: Awaitable[T]) -> T:
        """Await work; answer errors with a status, and give each one line in the log."""
        try:
            return await work
        except Refusal as refusal:
            await self._refuse(context, call, client, refusal)
        except WireError as error:
            await self._refuse(context, call, client, malformed(str(error)))
        except TimeoutError:
            log.warning("%s of %s: nothing came for %.0f s; it can be resumed", call, client, CHUNK_SECONDS)
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came for {CHUNK_SECONDS:.0f} s")
        except (FedMosaicError, OSError) as error:
            log.error("%s of %s failed: %s", call, client, error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server has a fault of its own; try again")
        except Exception:
            log.exception("%s of %s failed", call, client)
            await context.abort(grpc.StatusCode.INTERNAL, "the server has a fault of its own; see its log")
