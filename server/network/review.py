"""The gRPC service of the witness: what it has to see of a closed round, and what it says."""

import asyncio
import time
from collections.abc import AsyncIterator

from fedmosaic.protos import wire
from fedmosaic.protos.messages import Phase
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.protos.witnessing import Verdict
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.network.peers import Context
from fedmosaic.server.network.service import STATUS_SECONDS, FederationService, wait_seconds
from fedmosaic.server.network.waiting import Changes


class WitnessService(rpc.WitnessServicer):
    """Shows the witness a round, and takes its verdicts; refuses everybody else."""

    def __init__(self, service: FederationService, coordinator: Coordinator, changes: Changes) -> None:
        """Prepare; who calls, and how errors are answered, is the other service's to say."""
        self._calls = service
        self._coordinator = coordinator
        self._changes = changes

    async def Review(self, request: pb.ReviewRequest, context: Context) -> AsyncIterator[pb.ReviewResponse]:
        """Tell what is being waited for until a round is to be countersigned, then send it."""
        name = await self._calls.identify(context, "review", witness=True)
        witnessing = self._coordinator.witnessing
        deadline = time.monotonic() + wait_seconds(request.wait_milliseconds)
        while not witnessing.waiting:
            status = await self._calls.guarded(
                context, "review", name, asyncio.to_thread(self._coordinator.describe)
            )
            yield pb.ReviewResponse(waiting=wire.encode(status, pb.RoundState))
            left = deadline - time.monotonic()
            if status.phase is Phase.FINISHED or left <= 0.0 or self._changes.stopping:
                return
            await self._changes.until("round", lambda: witnessing.waiting, min(STATUS_SECONDS, left))
        parts = witnessing.parts()
        while True:
            part = await self._calls.guarded(context, "review", name, asyncio.to_thread(next, parts, None))
            if part is None:
                return
            yield part

    async def Countersign(self, request: pb.CountersignRequest, context: Context) -> pb.CountersignResponse:
        """See `Witnessing.take`."""
        name = await self._calls.identify(context, "countersign", witness=True)

        def take() -> pb.CountersignResponse:
            self._coordinator.witnessing.take(wire.decode(request, Verdict))
            return pb.CountersignResponse()

        return await self._calls.guarded(context, "countersign", name, asyncio.to_thread(take))
