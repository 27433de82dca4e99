"""A chain of rows, each with the hash of the one before: what is changed, removed, added or moved shows.

Only the end can be cut off unseen; who has noted a later hash finds that, too.
"""

import hashlib
from typing import Final, Protocol

FIRST_PREVIOUS_HASH: Final = "0" * 64


class ChainedRow(Protocol):
    """A row of a chain."""

    @property
    def sequence(self) -> int:
        """0 for the first row, then without gaps."""

    @property
    def previous_hash(self) -> str:
        """Hash of the row before; `FIRST_PREVIOUS_HASH` for the first."""

    @property
    def hash(self) -> str:
        """What `computed_hash` gave when the row was written."""

    def computed_hash(self) -> str:
        """`chained_hash` of the previous hash and everything in the row but `hash`."""


def chained_hash(previous_hash: str, content: str) -> str:
    """SHA-256 (hexadecimal) over the previous hash and a row's canonical JSON."""
    return hashlib.sha256(previous_hash.encode() + content.encode()).hexdigest()


def misfit(row: ChainedRow, index: int, previous_hash: str) -> str:
    """Why a row does not stand at this place of a chain; empty if it does."""
    if row.sequence != index:
        return f"row {row.sequence} stands in its place; a row was removed, added or moved"
    if row.previous_hash != previous_hash:
        return "it does not continue the row before it"
    if row.hash != row.computed_hash():
        return "its content does not match its hash"
    return ""
