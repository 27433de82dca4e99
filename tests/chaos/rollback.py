"""States that are put back to an older copy of themselves while their process is dead."""

import json
import random
import shutil
from pathlib import Path

from chaos.checks import notes_of
from chaos.processes import home

_OF_SERVER = ("older copy of its state", "another copy of its state")
_OF_CLIENT = ("is an older copy of itself", "LEDGER_BEHIND")


class Rollback:
    """Copies of states, and which process runs on an older one than its newest; `older` are these."""

    def __init__(self, place: Path, draw: random.Random) -> None:
        self._place, self._draw = place, draw
        self._copied: dict[str, Path] = {}
        self._acknowledged: dict[str, int] = {}
        self.older: dict[str, Path] = {}

    def died(self, name: str) -> bool:
        """Copy the state of a dead process, or put an earlier copy in its place; whether it did that."""
        state = home(self._place, name) / "state"
        if name in self.older or not (state / ("run.json" if name == "server" else "session.json")).exists():
            return False
        if name not in self._copied:
            self._copied[name] = shutil.copytree(state, self._place / f"{name}.copy")
            self._acknowledged[name] = self._receipts(name)
            return False
        if name != "server" and self._draw.random() < 0.5:
            return False
        self.older[name] = self._place / f"{name}.newest"
        state.rename(self.older[name])
        self._copied.pop(name).rename(state)
        forgot = self._receipts(name) - self._acknowledged[name]
        self._note(name, what="older", forgot=forgot)
        return True

    def told(self, name: str, words: str) -> str | None:
        """Whose state is an older copy by the last words of a process, if it is one."""
        about = "server" if any(each in words for each in _OF_SERVER) else name
        return (
            about if about in self.older and any(each in words for each in _OF_SERVER + _OF_CLIENT) else None
        )

    def put_newest_back(self, name: str) -> None:
        """The newest state of a process that is dead, which its operator had kept.

        An older copy that went on and released something, since nothing of it was known, is the newest.
        """
        state, newest = home(self._place, name) / "state", self.older.pop(name)
        whats = [note["what"] for note in notes_of(self._place, name)]
        since = whats[len(whats) - whats[::-1].index("older") :]
        if name != "server" and {"draw", "receipt"} & set(since):
            shutil.rmtree(newest)
            return
        shutil.rmtree(state)
        newest.rename(state)
        self._note(name, what="newest")

    def _note(self, name: str, **fields: object) -> None:
        with open(self._place / f"{name}.notes", "a") as notes:
            notes.write(json.dumps(fields) + "\n")

    def _receipts(self, name: str) -> int:
        return sum(note["what"] == "receipt" for note in notes_of(self._place, name))
