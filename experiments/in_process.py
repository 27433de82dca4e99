"""The transport without a network: a session talks to a coordinator in the same process.

The session, the coordinator and every check are those of a real federation; only sockets are missing.
"""

import threading
import time
from collections.abc import Callable

from fedmosaic.client.traffic import Traffic
from fedmosaic.protos.errors import TransportError
from fedmosaic.protos.messages import (
    Aggregate,
    Enrolled,
    Enrolment,
    KeyMessage,
    Receipt,
    RoundStatus,
    Upload,
)
from fedmosaic.server.coordinator import Coordinator

_POLL_SECONDS = 0.01


class InProcessTransport:
    """One client's line to a coordinator; several may be used from threads of their own."""

    def __init__(self, coordinator: Coordinator, client_id: str, patience_seconds: float = 600.0) -> None:
        self._coordinator = coordinator
        self._client_id = client_id
        self._patience = patience_seconds
        self._traffic = Traffic()
        self._changed = threading.Event()
        coordinator.subscribe(lambda *_: self._changed.set())

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """See `Coordinator.enrol`."""
        return self._coordinator.enrol(self._client_id, enrolment)

    def pull(self, round_number: int, on_wait: Callable[[RoundStatus], None] | None = None) -> Aggregate:
        """Wait for a round to open and return what to load before it.

        Raises:
            TransportError: the round did not open within this transport's patience.
        """
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            self._changed.clear()
            self._coordinator.advance()
            aggregate = self._coordinator.pull(self._client_id, round_number)
            if aggregate is not None:
                self._traffic.received("adapter", sum(len(s.payload) for s in aggregate.sections))
                return aggregate
            if on_wait is not None:
                on_wait(self._coordinator.status(self._client_id))
            self._changed.wait(_POLL_SECONDS)
        raise TransportError(f"round {round_number} did not open within {self._patience:.0f} s")

    def push(self, upload: Upload) -> Receipt:
        """See `Coordinator.push`."""
        receipt = self._coordinator.push(self._client_id, upload)
        self._traffic.sent("adapter", sum(len(s.payload) for s in upload.sections))
        self._coordinator.advance()
        return receipt

    def status(self) -> RoundStatus:
        """See `Coordinator.status`."""
        return self._coordinator.status(self._client_id)

    def report(self, statement: bytes) -> None:
        """See `Coordinator.report`."""
        self._coordinator.report(self._client_id, statement)

    def post_key_message(self, message: KeyMessage) -> None:
        """See `Coordinator.post_key_message`."""
        self._coordinator.post_key_message(self._client_id, message)
        self._traffic.sent("keys", len(message.payload))

    def read_key_messages(
        self, epoch: int, stage: str, expected: int, timeout_seconds: float
    ) -> dict[str, bytes]:
        """Messages of a stage, once `expected` are there, or what is there at the timeout."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            self._changed.clear()
            self._coordinator.advance()
            messages = self._coordinator.read_key_messages(self._client_id, epoch, stage)
            if len(messages) >= expected or time.monotonic() >= deadline:
                self._traffic.received("keys", sum(len(m) for m in messages.values()))
                return messages
            self._changed.wait(_POLL_SECONDS)

    def traffic(self) -> Traffic:
        """Bytes per channel."""
        return self._traffic

    def close(self) -> None:
        """Nothing to close."""
