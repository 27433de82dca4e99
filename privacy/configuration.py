"""Read configuration files into frozen models, with errors a person can act on."""

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from fedmosaic.protos.errors import ConfigurationError, StateError

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes, such as a SHA-256, as 64 hexadecimal digits."""
FIRST_PREVIOUS_HASH: Final = "0" * 64
_SHOWN = 200
_MOST_DIGITS = 400
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CREDENTIALS = re.compile(r"://[^/@\s]+@")


class Frozen(BaseModel):
    """Base of every configuration model: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_configuration(path: Path, model: type[Model]) -> Model:
    """A TOML file, or JSON by its ending, as a model; ConfigurationError names every problem and its key."""
    try:
        content = path.read_bytes()
        data = parse_json(content) if path.suffix == ".json" else tomllib.loads(decode_text(content))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = "no such file" if missing else f"cannot be read ({error.strerror})"
        raise ConfigurationError(f"{path}: {why}; give the path of a TOML or JSON configuration") from None
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigurationError(f"{path}: not valid {path.suffix[1:].upper() or 'TOML'}: {why}") from None
    return validate(data, model, str(path))


def read_own(path: Path, read: Callable[[Any], Value], remedy: str) -> Value | None:
    """What a small JSON file of ours holds; None if there is none, StateError with the remedy if damaged."""
    if not path.exists():
        return None
    try:
        return read(parse_json(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error)
        if isinstance(error, ValidationError):  # in a line, and without what was found there
            what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise StateError(f"{path} is damaged ({what}); {remedy}") from None


def decode_text(content: bytes) -> str:
    """UTF-8 text, with or without the byte order mark that some editors write; ValueError if it is none."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("the text is in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def parse_json(content: str | bytes) -> Any:
    """Parse one JSON value that somebody else wrote; whatever is wrong with it is a ValueError.

    Python's own decoder lets numbers that are not finite and halves of characters pass, and fails on deep
    nesting with an error of another family. Nothing of the text is quoted.
    """
    text = decode_text(content) if isinstance(content, bytes) else content
    try:
        value = json.loads(text, parse_constant=_not_finite, parse_float=_finite, parse_int=_whole)
    except json.JSONDecodeError as error:
        # The decoder's own error carries the whole text, which may be private.
        raise ValueError(f"{error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a character is cut in half (a lone surrogate)") from None
    return value


def canonical_json(value: object, *, ascii_only: bool = True) -> str:
    """JSON with one spelling per value, to hash or sign: sorted keys, no blanks, shortest floats, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False)


def chained_hash(previous_hash: str, content: str) -> str:
    """SHA-256 (hexadecimal) over the hash of the row before and a row's canonical JSON.

    In a chain of such rows, what is changed, removed, added or moved shows. Only the end can be cut off
    unseen; who has noted a later hash finds that, too.
    """
    return hashlib.sha256(previous_hash.encode() + content.encode()).hexdigest()


def misfit(row: Any, index: int, previous_hash: str) -> str:
    """Why a row of a chain, which has a `computed_hash()`, does not stand in its place; "" if it does."""
    if row.sequence != index:
        return f"row {row.sequence} stands in its place; a row was removed, added or moved"
    if row.previous_hash != previous_hash:
        return "it does not continue the row before it"
    return "" if row.hash == row.computed_hash() else "its content does not match its hash"


def _not_finite(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def validate(data: object, model: type[Model], source: str) -> Model:
    """Validate parsed data against `model`; see `read_configuration` for the errors."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in _explain(error, model))
        raise ConfigurationError(f"{source} is not a valid {model.__name__}:\n{problems}") from None


def _explain(error: ValidationError, model: type[BaseModel]) -> Iterable[str]:
    problems = error.errors()
    for problem in problems:
        place, reason = problem["loc"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "too_short" and any(
            other["loc"][: len(place)] == place and other is not problem for other in problems
        ):
            continue  # what pydantic says of a list whose items it has refused
        location = ".".join(str(part) for part in place) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            known = _keys_beside(model, place)
            near = difflib.get_close_matches(str(place[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            yield f"{location}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{location}: missing"
        elif isinstance(problem["input"], dict):
            # A rule over several keys; the whole table would hide it, and may hold a password.
            yield f"{location}: {reason}"
        else:
            shown = _CREDENTIALS.sub("://***@", repr(problem["input"]))
            shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
            yield f"{location}: {reason} (got {shown})"


def _keys_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: type[BaseModel] = model
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if nested:
            current = nested[0]
    return [field.alias or name for name, field in current.model_fields.items()]
