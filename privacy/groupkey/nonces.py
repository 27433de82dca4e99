"""Monotonic counters on a client's disk: no epoch twice, and nothing encrypted twice under one nonce."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import EncryptionError, StateError

NONCE_BYTES = 16
Count = Annotated[int, Field(ge=0, lt=1 << 64)]


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    federation: str
    epoch: Count | None = None
    round: Count = 0
    uploads: dict[str, Count] = Field(default_factory=dict)
    """Nonces taken by section in the current round."""


class NonceCounter:
    """What this client has opened and encrypted, durable before anything is sent; of one federation."""

    def __init__(self, path: Path, federation: str) -> None:
        self._path = path
        self._state = self._read(federation)

    @property
    def epoch(self) -> int | None:
        """The latest epoch that was opened, None before the first."""
        return self._state.epoch

    def open_epoch(self, number: int) -> None:
        """Claim an epoch before its key agreement starts; EncryptionError if it may be replayed."""
        if self._state.epoch is not None and number <= self._state.epoch:
            raise EncryptionError(f"epoch {number} is used: the next one is at least {self._state.epoch + 1}")
        self._write(_State(federation=self._state.federation, epoch=number))

    def take(self, epoch: int, round_number: int, section: str) -> bytes:
        """A nonce (16 random bytes) for one upload, after recording on disk that it was taken.

        A client that repeats a round sends its stored upload again and takes no nonce; it takes another one
        where a crash lost the upload. EncryptionError if the epoch or round is over.
        """
        state = self._state
        if state.epoch is None or epoch != state.epoch:
            raise EncryptionError(
                f"epoch {epoch} is not the one opened last ({state.epoch}): agree on a key first"
            )
        if round_number < state.round:
            raise EncryptionError(f"round {round_number} is over, round {state.round} has begun")
        uploads = dict(state.uploads) if round_number == state.round else {}
        uploads[section] = uploads.get(section, 0) + 1
        self._write(_State(federation=state.federation, epoch=epoch, round=round_number, uploads=uploads))
        return os.urandom(NONCE_BYTES)

    def _read(self, federation: str) -> _State:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return _State(federation=federation)
        try:
            state = _State.model_validate_json(content)
        except ValidationError:
            raise StateError(f"{self._path} is damaged: restore it, or start with an unused epoch") from None
        if state.federation != federation:
            raise StateError(f"{self._path} is of federation {state.federation!r}, expected {federation!r}")
        return state

    def _write(self, state: _State) -> None:
        write_atomically(self._path, json.dumps(state.model_dump(), sort_keys=True).encode() + b"\n")
        self._state = state


def rotation_reason(
    key_members: Collection[str], taking_part: Collection[str], rounds_used: int, rotate_every: int
) -> str | None:
    """Why a new key epoch is due, as a sentence for the log; None while the key may be used."""
    joined = sorted(set(taking_part) - set(key_members))
    if joined:
        return f"members without the key take part: {', '.join(joined)}"
    left = sorted(set(key_members) - set(taking_part))
    if left:
        return f"members that hold the key no longer take part: {', '.join(left)}"
    if rounds_used >= rotate_every:
        return f"the key has served {rounds_used} of {rotate_every} rounds"
    return None
