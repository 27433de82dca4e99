"""Every bound of the wire, and the checks that hold values to them.

Both sides check before they use a value. A check that fails raises `WireError` naming the field, what
came and what would be right; text from the network is quoted shortened, payloads are never quoted.
"""

import re
from collections.abc import Collection
from typing import Final

from fedmosaic.protos.errors import WireError

MAX_MESSAGE_BYTES: Final = 1 << 20
MAX_CHUNK_BYTES: Final = MAX_MESSAGE_BYTES - 4096
"""Largest piece of a payload in one message; the rest is room for the message around it."""
MAX_PAYLOAD_BYTES: Final = 1 << 30
"""Largest sum of the sections of one upload or aggregate."""
MAX_MEMBERS: Final = 4096
"""Largest federation: two weight rows over so many contributors still fit one message."""
MAX_ROUNDS: Final = 1_000_000
MAX_KEY_EPOCH: Final = 1 << 31
MAX_PROFILE_DIMENSIONS: Final = 1 << 16
MAX_RELEASES: Final = 1 << 20
MAX_WEIGHT_BITS: Final = 30
MAX_KEY_PAYLOAD_BYTES: Final = 1 << 16
"""Largest message of a key agreement; one of a sum (`SUM_STAGES`) may fill a chunk."""
SUM_STAGES: Final = "sum-"
MAX_STATEMENT_BYTES: Final = 1 << 19
MAX_WAIT_MILLISECONDS: Final = 60_000
"""Longest that the server keeps a call that waits."""
MAX_TEXT: Final = 1024

HASH_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_ATTEMPT_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_STAGE = re.compile(r"[a-z0-9-]{1,32}")
_FAMILY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}|")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def check_integer(field: str, value: int, low: int, high: int) -> None:
    """Refuse anything but an integer in low … high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WireError(f"{field} is {_shown(value)}, expected an integer in {low} … {high}")


def check_real(field: str, value: float, low: float, high: float) -> None:
    """Refuse anything but a finite number in low … high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise WireError(f"{field} is {_shown(value)}, expected a number in {low:g} … {high:g}")


def check_bytes(field: str, value: bytes, low: int, high: int) -> None:
    """Refuse anything but bytes of a length in low … high."""
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        got = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        expected = f"{low}" if low == high else f"{low} … {high}"
        raise WireError(f"{field} has {got}, expected {expected} bytes")


def check_hash(field: str, value: bytes) -> None:
    """Refuse anything but a SHA-256 digest."""
    check_bytes(field, value, HASH_BYTES, HASH_BYTES)


def check_text(field: str, value: str, limit: int = MAX_TEXT) -> None:
    """Refuse text that is too long or could break a log line."""
    if not isinstance(value, str) or len(value) > limit or not (value.isprintable() or not value):
        raise WireError(f"{field} is {_shown(value)}, expected printable text of at most {limit} characters")


def check_identifier(field: str, value: str) -> None:
    """Refuse anything but a client or federation id."""
    _check_pattern(field, value, _IDENTIFIER, "1 to 63 of a-z, 0-9 and '-', not starting with '-'")


def check_run_id(field: str, value: str) -> None:
    """Refuse anything but a run id."""
    _check_pattern(field, value, _RUN_ID, "32 hexadecimal digits")


def check_attempt_id(field: str, value: str) -> None:
    """Refuse anything but an attempt id."""
    _check_pattern(field, value, _ATTEMPT_ID, "1 to 64 letters, digits and '-'")


def check_stage(field: str, value: str) -> None:
    """Refuse anything but the name of a stage of a key agreement."""
    _check_pattern(field, value, _STAGE, "1 to 32 of a-z, 0-9 and '-'")


def check_relayed(stage: str, payload: bytes) -> None:
    """Refuse a message of the relay that is too long for its stage."""
    limit = MAX_CHUNK_BYTES if stage.startswith(SUM_STAGES) else MAX_KEY_PAYLOAD_BYTES
    check_bytes("key_message.payload", payload, 0, limit)


def check_family(field: str, value: str) -> None:
    """Refuse anything but the name of a family, or nothing."""
    _check_pattern(field, value, _FAMILY, "at most 128 letters, digits and . _ : / -")


def check_unique(field: str, values: Collection[object], limit: int) -> None:
    """Refuse too many names, or one that appears twice."""
    if len(values) > limit:
        raise WireError(f"{field} has {len(values)} entries, expected at most {limit}")
    if len(set(values)) != len(values):
        raise WireError(f"{field} names something twice; every entry may appear once")


def _check_pattern(field: str, value: str, pattern: re.Pattern[str], expected: str) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise WireError(f"{field} is {_shown(value)}, expected {expected}")
