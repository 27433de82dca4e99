"""States that are put back to an older copy of themselves while their process is dead."""

import random
import shutil
from pathlib import Path

from chaos.checks import notes_of
from chaos.processes import home, notebook

_TOLD = ("older copy", "another copy of its state", "LEDGER_BEHIND")


class Rollback:
    """Copies of states, and which process runs on an older one than its newest; `older` are these."""

    def __init__(self, place: Path, draw: random.Random) -> None:
        self._place, self._draw = place, draw
        self._copied: dict[str, Path] = {}
        self._acknowledged: dict[str, int] = {}
        self.older: dict[str, Path] = {}

    def died(self, name: str) -> bool:
        """Copy the state of a dead process, or put its copy back, or the newest; whether it is the copy."""
        state = home(self._place, name) / "state"
        if name in self.older:
            self.put_newest_back(name)
            return False
        if not (state / "lock").exists():
            return False
        if name not in self._copied:
            self._copied[name] = shutil.copytree(state, self._place / f"{name}.copy")
            self._acknowledged[name] = self._receipts(name)
            return False
        if self._draw.random() < 0.5:
            return False
        self.older[name] = self._place / f"{name}.newest"
        state.rename(self.older[name])
        self._copied.pop(name).rename(state)
        forgot = self._receipts(name) - self._acknowledged[name]
        notebook(self._place / f"{name}.notes")("older", forgot=forgot)
        return True

    def told(self, name: str, words: str) -> bool:
        """Whether a process ended since it, or its server, runs on an older copy, and said so."""
        return bool({name, "server"} & self.older.keys()) and any(word in words for word in _TOLD)

    def put_newest_back(self, name: str) -> None:
        """The newest state of a process that is dead, which its operator had kept."""
        state = home(self._place, name) / "state"
        shutil.rmtree(state)
        self.older.pop(name).rename(state)
        notebook(self._place / f"{name}.notes")("newest")

    def _receipts(self, name: str) -> int:
        return sum(note["what"] == "receipt" for note in notes_of(self._place, name))
