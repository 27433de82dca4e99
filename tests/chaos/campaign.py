"""Runs of small federations in which processes are killed with SIGKILL at moments drawn from a seed."""

import gc
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from chaos import faults
from chaos.checks import faults_of, final_vectors, last_words
from chaos.disk import put_back
from chaos.peers import torment
from chaos.processes import home, start
from chaos.rollback import Rollback
from end_to_end import federation_of_vectors as fv
from end_to_end import test_group_sums as sums
from end_to_end.ports import free_port
from fedmosaic.privacy.federation.kits import WitnessEntry
from fedmosaic.privacy.federation.terms import Terms

_PATIENT = {"round_deadline_seconds": 900, "gathering_seconds": 300, "key_patience_seconds": 300}
_LIMIT_SECONDS = 420.0
"""A run that takes longer hangs."""
_SAID = (1, 2)
"""Exit statuses of a process that said in a line what it cannot go on with."""
_FAILING = ("disk-full", "read-only", "postgresql")
"""Faults that may end a process so; it is started again, as an operator would."""
WITNESS = "notary"
FAMILY = "tiny"


def _changed(terms: Terms, part: str, **values: object) -> Terms:
    content = terms.model_dump()
    return Terms.model_validate({**content, part: {**content[part], **values}})


_PLAIN = fv.terms("plain", 3, **_PATIENT)
_MASKED = fv.terms("mask", 4, rotate_key_every=2, **_PATIENT)
_CKKS = fv.terms("ckks", 3, **_PATIENT)
_SUMMED = _changed(sums.group_terms(4, minimum=5), "schedule", round_deadline_seconds=20)
_TURNS = _changed(sums.group_terms(6, minimum=3, sampled=4), "schedule", round_deadline_seconds=20)
_DRAWN = {"sampled_clients": 4, "rotate_key_every": 2, **_PATIENT}
_SOME_PLAIN = fv.terms("plain", 6, **_DRAWN)
MODES = {
    "none": (fv.MEMBERS, _PLAIN),
    "mask": (fv.MEMBERS, _MASKED),
    "mask+family": (fv.MEMBERS, _changed(_MASKED, "adapter", family_dimensions={FAMILY: 40})),
    "ckks": (fv.MEMBERS, _CKKS),
    "ckks+witness": (fv.MEMBERS, _CKKS),
    "dp": (fv.MEMBERS, _changed(_PLAIN, "adapter", protection="dp")),
    "dp+mask": (fv.MEMBERS, _changed(_MASKED, "adapter", protection="dp+encrypted")),
    "dp+ckks": (fv.MEMBERS, _changed(_CKKS, "adapter", protection="dp+encrypted")),
    "distributed-dp": (sums.MEMBERS[:8], _SUMMED),
    "distributed-dp+person": (sums.MEMBERS[:8], _changed(_SUMMED, "group_sums", unit="person")),
    "distributed-dp, four of nine": (sums.MEMBERS, _TURNS),
    "mask, four of nine": (sums.MEMBERS, fv.terms("mask", 6, **_DRAWN)),
    "ckks, four of nine": (sums.MEMBERS, fv.terms("ckks", 6, **_DRAWN)),
    "dp, four of nine": (sums.MEMBERS, _changed(_SOME_PLAIN, "adapter", protection="dp")),
}
"""Members and terms by what protects the adapter, and what goes with it."""


@dataclass
class Run:
    """One federation from its foundation to its end.

    Attributes:
        place: its directory.
        mode: of `MODES`.
        kills: how many processes to kill, or to have something else befall.
        mean_seconds: between two kills by the clock.
        fault: what befalls them, of `faults.FAULTS`.
        killed: servers, clients and databases, and what else befell.
        flipped: what the file with a flipped bit held, and those beside it, by whose it is.
    """

    place: Path
    mode: str
    draw: random.Random
    kills: int
    mean_seconds: float
    fault: str = "kill"
    seconds: float = 0.0
    killed: Counter[str] = field(default_factory=Counter)
    flipped: dict[str, dict[Path, bytes]] = field(default_factory=dict)
    rollback: Rollback | None = None
    database: faults.Postgresql | None = None
    faults: list[str] = field(default_factory=list)

    def play(self, undisturbed: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Run to the end and check; returns the final adapters, and leaves the faults in `faults`."""
        self.members, terms = MODES[self.mode]
        shutil.rmtree(self.place, ignore_errors=True)
        if self.fault == "rollback":
            # Whoever joined an agreement that the server has forgotten is waited for to its end.
            terms = _changed(terms, "schedule", gathering_seconds=20, key_patience_seconds=20)
            self.rollback = Rollback(self.place, self.draw)
        witness = WitnessEntry(id=WITNESS, seconds=300.0) if "witness" in self.mode else None
        families = dict.fromkeys(self.members if terms.adapter.family_dimensions else (), FAMILY)
        fv.make_federation(self.place / "f", terms, self.members, families, witness)
        self.others = (*self.members, *([WITNESS] if witness else []))
        self.port = free_port()
        try:
            settings = f'listen = "127.0.0.1:{self.port}"\nstate_dir = "state"\n'
            if self.fault == "postgresql":
                self.database = faults.Postgresql()
                settings += f'store_url = "{self.database.url}"\n'
            (self.place / "f" / "server" / "server.toml").write_text(settings)
            began = time.monotonic()
            self._run(began)
            self.seconds = time.monotonic() - began
            if not self.faults and not self.killed["two pasts"]:
                self.faults += faults_of(self.place, self.members, undisturbed, self.fault)
        finally:
            if self.database is not None:
                self.database.remove()
        return final_vectors(self.place, self.members)

    def _run(self, began: float) -> None:
        self.live: dict[int, str] = {}
        hostile = torment(self.place, self.members[-1], self.port, self.draw) if self.fault == "peers" else 0
        self.killed["peers"] += hostile != 0
        try:
            self._until_finished(began)
        finally:
            for process in (*self.live, *([hostile] if hostile else [])):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)

    def _start(self, name: str) -> None:
        step = 0
        if self.killed.total() < self.kills and self.draw.random() < 0.6:
            step = 1 + int(self.draw.expovariate(1 / (60 if name == "server" else 30)))
            self.killed[self.fault] += self.fault in faults.STEPS and self.fault != "kill"
        seed = self.members.index(name) if name in self.members else None
        draw = random.Random(self.draw.random())
        self.live[start(self.place, name, seed, self.port, step, self.fault, draw)] = name

    def _until_finished(self, began: float) -> None:
        for name in ("server", *self.others):
            self._start(name)
        next_kill = began + self.draw.expovariate(1 / self.mean_seconds)
        finished: set[str] = set()
        while len(finished) < len(self.others):
            now = time.monotonic()
            if self.killed["two pasts"]:
                return  # there is no going on, but with a new run
            if now - began > _LIMIT_SECONDS or len(self.faults) > 3:
                left = ", ".join(sorted(set(self.others) - finished))
                self.faults.append(f"not finished after {now - began:.0f} s: {left}")
                return
            while ended := self._ended():
                if self._goes_on(*ended):
                    self._start(ended[0])
                else:
                    finished.add(ended[0])
            if now > next_kill:
                next_kill = now + self.draw.expovariate(1 / self.mean_seconds)
                if self.killed.total() < self.kills:
                    self._kill()
            time.sleep(0.01)
        self._stop()

    def _goes_on(self, name: str, code: int) -> bool:
        """What is done about a process that ended; whether it is started again."""
        if code == -signal.SIGKILL:
            self._was_killed(name)
        elif code == 0 and name != "server":
            return False
        elif code in _SAID and name in self.flipped:
            for path, content in self.flipped.pop(name).items():
                path.write_bytes(content)
        elif (
            code in _SAID
            and self.rollback
            and (whose := self.rollback.told(name, last_words(self.place, name)))
        ):
            self._put_newest_back(whose)
        elif code in _SAID and self.rollback and "another copy of its state" in last_words(self.place, name):
            self.killed["two pasts"] += 1  # it had gone on with the older one, and says so
        elif code not in _SAID or self.fault not in _FAILING:
            self.faults.append(f"{name} ended with exit status {code}: {last_words(self.place, name)}")
        return True

    def _was_killed(self, name: str) -> None:
        self.killed["server" if name == "server" else "client"] += 1
        self.killed["power-cut"] += put_back(home(self.place, name), self.place / f"{name}.disk")
        if self.fault == "bit-flip" and name not in self.flipped:
            self._flip(name)
        if self.rollback is not None:
            self.killed["rollback"] += self.rollback.died(name)

    def _put_newest_back(self, whose: str) -> None:
        """A process has said that a state is an older copy: its operator ends what runs on it."""
        assert self.rollback is not None
        there = [process for process, name in self.live.items() if name == whose]
        for process in there:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            del self.live[process]
        self.rollback.put_newest_back(whose)
        if there:
            self._start(whose)

    def _flip(self, name: str) -> None:
        state = home(self.place, name) / "state"
        if (state / "lock").exists() and list(state.glob("*.json")):
            self.flipped[name] = faults.flip_bit(state, self.draw)
            self.killed["bit-flip"] += 1

    def _kill(self) -> None:
        if self.database is not None:
            self.killed["database"] += 1
            self.database.kill()
            self.database.start()
            return
        clients = sorted(process for process, name in self.live.items() if name != "server")
        servers = sorted(self.live.keys() - set(clients))
        share = 0.4 if self.rollback is None else 0.7  # of what a server forgets, clients have to say so
        chosen = servers if self.draw.random() < share or not clients else clients
        os.kill(self.draw.choice(chosen), signal.SIGKILL)

    def _stop(self) -> None:
        """End the server as its operator would; one that has just been killed has to come back for it."""
        process = next(process for process, name in self.live.items() if name == "server")
        os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + 120.0
        while (ended := self._ended()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        code = None if ended is None else ended[1]
        told = "is older than the run" in last_words(self.place, "server")
        if (told and code == 1 and self.fault in _FAILING) or code in (-signal.SIGKILL, -signal.SIGTERM):
            if code == -signal.SIGKILL:
                self._was_killed("server")
            summary = self.place / "f" / "server" / "state" / "run.json"
            summary.unlink(missing_ok=True)
            self.kills = 0
            self._start("server")
            while not summary.exists():
                time.sleep(0.1)
            self._stop()
        elif code != 0:
            self.faults.append(f"the server ended with exit status {code} after SIGTERM (None: not at all)")

    def _ended(self) -> tuple[str, int] | None:
        for process in list(self.live):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return self.live.pop(process), os.waitstatus_to_exitcode(status)
        return None


def _possible() -> list[str]:
    """The faults that can be had here; says which cannot, and why."""
    if lacking := faults.lacking():
        print(f"no database is killed: there is no {lacking} here", flush=True)
    return [fault for fault in faults.FAULTS if fault != "postgresql" or not lacking]


def campaign(
    seed: int, seconds: float, kills: int, place: Path, modes: list[str], only: int | None = None
) -> list[Run]:
    """Runs of every mode in turn, of each one with every fault, for a time or until so many are killed.

    `only` is the number of the one run to repeat, beside the undisturbed one of its mode.
    """
    gc.freeze()  # what was imported stays one copy for all processes that are forked from this one
    runs: list[Run] = []
    possible = _possible()
    undisturbed: dict[str, tuple[float, dict[str, np.ndarray]]] = {}
    began, ended, least = time.monotonic(), 0, len(modes) + max(len(modes), len(possible))
    for number in count() if only is None else sorted({only % len(modes), only}):
        over = ended >= kills if kills else time.monotonic() - began > seconds
        if only is None and number >= least and over:
            break
        mode = modes[number % len(modes)]
        draw = random.Random(f"{seed} {number}")
        calm = mode not in undisturbed
        mean = 1.0 if calm else max(0.3, undisturbed[mode][0] / 4)
        # Each mode has another fault than the one before, and in the end every fault.
        fault = "kill" if calm else possible[(number // len(modes) - 1 + number % len(modes)) % len(possible)]
        run = Run(place / f"run-{number:04d}", mode, draw, 0 if calm else draw.randint(8, 24), mean, fault)
        final = run.play(None if calm else undisturbed[mode][1])
        if calm:
            undisturbed[mode] = (run.seconds, final)
        runs.append(run)
        ended += sum(run.killed[what] for what in ("server", "client", "database"))
        print(
            f"run {number:4d}  {mode:21s} {fault:10s} {run.seconds:6.1f} s  {dict(+run.killed)}  "
            f"{'; '.join(run.faults) or 'as it should be'}",
            flush=True,
        )
        if not run.faults:
            shutil.rmtree(run.place)
    return runs
