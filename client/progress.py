"""Where a client tells a person, or the process that started it, how far it is."""

import json
import logging
import time
from pathlib import Path

from fedmosaic.privacy.files import private_opener
from fedmosaic.protos.messages import RoundStatus

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_WAIT_LINES = 15.0
_SECONDS_BETWEEN_RECORDS = 0.2


class Progress:
    """What a session and a learner report while they work; this one tells nobody.

    Nothing private passes through here.
    """

    def stage(self, round_number: int, name: str, total: int = 0) -> None:
        """A new stage begins; `total` steps are expected, 0 if unknown."""

    def advance(self, done: int) -> None:
        """`done` steps of the current stage are finished."""

    def waiting(self, status: RoundStatus) -> None:
        """The server is waited for; `status` says for whom, and how long at most."""


class LoggedProgress(Progress):
    """Writes log lines for a person and, if a file is given, JSON lines for whoever follows it."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._current: dict[str, object] = {}
        self._last_record = 0.0
        self._last_wait_line = 0.0

    def stage(self, round_number: int, name: str, total: int = 0) -> None:
        """See `Progress.stage`."""
        log.info("round %d: %s", round_number, name) if round_number else log.info("%s", name)
        self._current = {"round": round_number, "stage": name, "done": 0, "total": total}
        self._record(force=True)

    def advance(self, done: int) -> None:
        """See `Progress.advance`."""
        self._current["done"] = done
        self._record(force=done == self._current.get("total"))

    def waiting(self, status: RoundStatus) -> None:
        """See `Progress.waiting`."""
        self._current["waiting_for"] = list(status.waiting_for)
        self._record(force=False)
        now = time.monotonic()
        if now - self._last_wait_line >= _SECONDS_BETWEEN_WAIT_LINES:
            self._last_wait_line = now
            # The server's words name the round themselves.
            log.info("%s", status.message)

    def _record(self, *, force: bool) -> None:
        now = time.monotonic()
        if self._file is None or not (force or now - self._last_record >= _SECONDS_BETWEEN_RECORDS):
            return
        self._last_record = now
        with open(self._file, "a", encoding="utf-8", opener=private_opener) as file:
            file.write(json.dumps({"time": time.time(), **self._current}) + "\n")
