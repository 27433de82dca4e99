"""A chain of rows, each with the hash of the one before: what is changed, removed, added or moved shows.

Only the end can be cut off unseen; who has noted a later hash finds that, too.
"""

import hashlib
from typing import Any, Final

FIRST_PREVIOUS_HASH: Final = "0" * 64


def chained_hash(previous_hash: str, content: str) -> str:
    """SHA-256 (hexadecimal) over the previous hash and a row's canonical JSON."""
    return hashlib.sha256(previous_hash.encode() + content.encode()).hexdigest()


def misfit(row: Any, index: int, previous_hash: str) -> str:
    """Why a row (with `sequence`, `previous_hash`, `hash`, `computed_hash()`) does not stand at this place.

    Empty if it does.
    """
    if row.sequence != index:
        return f"row {row.sequence} stands in its place; a row was removed, added or moved"
    if row.previous_hash != previous_hash:
        return "it does not continue the row before it"
    return "" if row.hash == row.computed_hash() else "its content does not match its hash"
