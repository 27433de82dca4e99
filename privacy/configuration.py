"""Read configuration files into frozen models, with errors a person can act on."""

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmosaic.protos.errors import ConfigurationError

Model = TypeVar("Model", bound=BaseModel)
_SHOWN = 200


class Frozen(BaseModel):
    """Base of every configuration model: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_configuration(path: Path, model: type[Model]) -> Model:
    """Read a TOML file, or a JSON file by its ending, into `model`.

    Args:
        path: the file.
        model: a pydantic model that forbids unknown keys.

    Returns:
        The validated model.

    Raises:
        ConfigurationError: the file cannot be read, is no TOML, or does not fit the model; every
            problem is named with its key, its value and, for an unknown key, the nearest valid one.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path}: no such file; give the path of a TOML or JSON configuration"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"{path}: cannot be read ({error.strerror}); give the path of a TOML or JSON configuration"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not valid {path.suffix[1:].upper() or 'TOML'}: {error}") from None
    return validate(data, model, str(path))


def validate(data: object, model: type[Model], source: str) -> Model:
    """Validate parsed data against `model`; see `read_configuration` for the errors."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in _explain(error, model))
        raise ConfigurationError(f"{source} is not a valid {model.__name__}:\n{problems}") from None


def _explain(error: ValidationError, model: type[BaseModel]) -> Iterable[str]:
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            known = _keys_beside(model, problem["loc"])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            yield f"{location}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{location}: missing"
        elif isinstance(problem["input"], dict):
            # A rule over several keys; the whole table would hide it, and may hold a password.
            yield f"{location}: {problem['msg']}"
        else:
            shown = repr(problem["input"])
            shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
            yield f"{location}: {problem['msg']} (got {shown})"


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
