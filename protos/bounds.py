"""Every bound of the wire: numbers that both sides know, and types that hold a message's fields to them."""

import dataclasses
import enum
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    FailFast,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from fedmosaic.protos.errors import WireError

MAX_MESSAGE_BYTES: Final = 1 << 20
MAX_CHUNK_BYTES: Final = MAX_MESSAGE_BYTES - 4096
"""Largest piece of a payload in one message; the rest is room for the message around it."""
MAX_PAYLOAD_BYTES: Final = 1 << 30
"""Largest sum of the sections of one upload or aggregate."""
MAX_MEMBERS: Final = 10_000
"""Largest federation: the names of so many still fit one message."""
MAX_CONTRIBUTORS: Final = 4096
"""Most members that take part in a round: two weight rows over so many still fit one message."""
MAX_ROUNDS: Final = 1_000_000
MAX_KEY_EPOCH: Final = 1 << 31
MAX_PROFILE_DIMENSIONS: Final = 1 << 16
MAX_RELEASES: Final = 1 << 20
MAX_WEIGHT_BITS: Final = 30
MAX_KEY_PAYLOAD_BYTES: Final = 1 << 16
"""Largest message of a key agreement."""
MAX_RELAYED_BYTES: Final = MAX_MEMBERS * MAX_KEY_PAYLOAD_BYTES
"""Most that a reader takes of all messages of one stage."""
MAX_STATEMENT_BYTES: Final = 1 << 19
MAX_WAIT_MILLISECONDS: Final = 60_000
"""Longest that the server keeps a call that waits."""
MAX_TEXT: Final = 1024
HASH_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


def _printable(text: str) -> str:
    if text and not text.isprintable():
        raise ValueError("expected printable text")  # anything else could break a line of a log
    return text


def _unique(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("every entry may appear once")
    return names


def _or_nothing(size: int) -> AfterValidator:
    def check(value: bytes) -> bytes:
        if len(value) not in (0, size):
            raise ValueError(f"expected {size} bytes or none")
        return value

    return AfterValidator(check)


Hash = Annotated[bytes, Field(strict=True, min_length=HASH_BYTES, max_length=HASH_BYTES)]
"""A SHA-256 digest."""
HashOrNothing = Annotated[bytes, Field(strict=True), _or_nothing(HASH_BYTES)]
Signature = Annotated[bytes, Field(strict=True, min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
SignatureOrNothing = Annotated[bytes, Field(strict=True), _or_nothing(SIGNATURE_BYTES)]
Identifier = Annotated[str, Field(strict=True, pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""Id of a client or federation."""
# The first that is wrong is enough: a hostile message holds hundreds of thousands.
Identifiers = Annotated[
    tuple[Identifier, ...], FailFast(), Field(max_length=MAX_CONTRIBUTORS), AfterValidator(_unique)
]
Members = Annotated[
    tuple[Identifier, ...], FailFast(), Field(max_length=MAX_MEMBERS), AfterValidator(_unique)
]
RunId = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]
AttemptId = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9-]{1,64}$")]
Stage = Annotated[str, Field(strict=True, pattern=r"^[a-z0-9-]{1,32}$")]
"""Name of a stage of a key agreement."""
Family = Annotated[str, Field(strict=True, pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/-]{0,127})?$")]
"""Name of an architecture, or nothing."""
Text = Annotated[str, Field(strict=True, max_length=MAX_TEXT), AfterValidator(_printable)]
Round = Annotated[int, Field(strict=True, ge=1, le=MAX_ROUNDS + 1)]
"""Number of a round; one above the last stands for the end of the run."""
KeyEpoch = Annotated[int, Field(strict=True, ge=0, le=MAX_KEY_EPOCH)]
KeyPayload = Annotated[bytes, Field(strict=True, max_length=MAX_CHUNK_BYTES)]
"""A relayed message; one of a key agreement has at most `MAX_KEY_PAYLOAD_BYTES`."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Message:
    """Base of every message: whatever breaks a bound is a `WireError` that names the field and the bound."""

    @model_validator(mode="wrap")
    @classmethod
    def _within_bounds(cls, content: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return build(content)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
        place = list(problem["loc"])
        if place and isinstance(place[0], int):  # of an argument without its name
            place[0] = dataclasses.fields(cls)[place[0]].name
        field = ".".join(map(str, (cls.__name__, *place)))
        raise WireError(f"{field} is {_shown(problem['input'])}: {problem['msg']}")


def _shown(value: object) -> str:
    """A refused value, shortened; of bytes, which may be a payload, only the length."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if value is None or isinstance(value, str | int | float | enum.Enum):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}…"
    return f"a {type(value).__name__}"
