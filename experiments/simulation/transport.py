"""The transport without a network: a session talks to a coordinator in the same process."""

import math
import threading
import time
from collections.abc import Callable

from fedmosaic.client.transport.grpc import Traffic
from fedmosaic.protos.errors import TransportError
from fedmosaic.protos.messages import Aggregate, Enrolled, Enrolment, KeyMessage, Receipt, RoundStatus, Upload
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.run import Topic

TICK_SECONDS = 0.25
"""How often a waiting client looks at the clock for deadlines; everything else comes as an event."""


class TurnOverError(TransportError):
    """The round that a client asks for is not open yet, or is of another turn, so its turn is over."""


class InProcessTransport:
    """One client's way to a coordinator; several may be used from threads of their own."""

    def __init__(
        self,
        coordinator: Coordinator,
        client_id: str,
        patience_seconds: float = 600.0,
        stopped: threading.Event | None = None,
        tick_seconds: float = TICK_SECONDS,
        traffic: Traffic | None = None,
    ) -> None:
        """Connect; `stopped` is set by whoever gives the run up, before `wake`, and ends every wait.

        A client waits at most `patience_seconds` for a round to open, and looks at the clock every
        `tick_seconds`; `traffic` goes on where an earlier process stopped.
        """
        self._coordinator = coordinator
        self._client_id = client_id
        self._patience = patience_seconds
        self._stopped = stopped or threading.Event()
        self._tick = tick_seconds
        self._traffic = traffic or Traffic()
        self.last_round = math.inf
        """The last round that is opened to it. Whoever closes a round would begin the next alone, and wait in
        it for others whose turns are over."""
        self._round_changed = threading.Event()
        self._keys_changed = threading.Event()
        coordinator.subscribe(self._hear)

    def _hear(self, topic: Topic) -> None:
        if topic == "upload":
            return  # with N clients that would be N² wake-ups a round, for nothing
        if topic == "keys":
            self._keys_changed.set()
        self._round_changed.set()

    def wake(self) -> None:
        """Let a waiting client look at once."""
        self._round_changed.set()
        self._keys_changed.set()

    def _check_going_on(self) -> None:
        if self._stopped.is_set():
            raise TransportError("the run was given up; the first error that was reported tells why")

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """See `Coordinator.enrol`."""
        return self._coordinator.enrol(self._client_id, enrolment)

    def pull(self, round_number: int, on_wait: Callable[[RoundStatus], None] | None = None) -> Aggregate:
        """Wait for a round to open and return what to load before it.

        `TurnOverError` if it does not open within this transport's patience, or, once `on_wait` is told what
        the server waits for, if it is after `last_round`; `TransportError` if the run was given up.
        """
        if round_number > self.last_round:
            if on_wait is not None:
                on_wait(self._coordinator.status(self._client_id))
            raise TurnOverError(f"round {round_number} is of another turn than round {self.last_round:.0f}")
        deadline = time.monotonic() + self._patience
        while True:
            self._check_going_on()
            self._round_changed.clear()
            self._coordinator.advance()
            aggregate = self._coordinator.pull(self._client_id, round_number)
            if aggregate is not None:
                self._traffic.received("adapter", sum(len(s.payload) for s in aggregate.sections))
                return aggregate
            if time.monotonic() >= deadline:
                raise TurnOverError(f"round {round_number} did not open within {self._patience:.0f} s")
            if on_wait is not None:
                on_wait(self._coordinator.status(self._client_id))
            self._round_changed.wait(self._tick)

    def push(self, upload: Upload) -> Receipt:
        """See `Coordinator.push`."""
        self._check_going_on()
        receipt = self._coordinator.push(self._client_id, upload)
        self._traffic.sent("adapter", sum(len(s.payload) for s in upload.sections))
        if upload.profile is not None:
            self._traffic.sent("profile", upload.profile.vector.nbytes)
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
            self._check_going_on()
            self._keys_changed.clear()
            self._coordinator.advance()
            messages = self._coordinator.read_key_messages(self._client_id, epoch, stage)
            if len(messages) >= expected or time.monotonic() >= deadline:
                self._traffic.received("keys", sum(len(m) for m in messages.values()))
                return messages
            self._keys_changed.wait(min(self._tick, max(0.0, deadline - time.monotonic())))

    def traffic(self) -> Traffic:
        """Bytes per channel."""
        return self._traffic

    def close(self) -> None:
        """Hear of no more changes."""
        self._coordinator.unsubscribe(self._hear)
