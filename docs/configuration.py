"""Write `docs/configuration.md`, the reference of every key, from the models that read the files.

    python docs/configuration.py

A key's meaning is what stands below it in its model, or under `Attributes:` in the model's docstring; its
type, default and range are the model's own. A test fails where the page and the models differ.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.witness import WitnessSettings
from fedmosaic.privacy.federation.kits import FederationConfig
from fedmosaic.server.settings import OperatorSettings

PAGE = Path(__file__).with_name("configuration.md")
FILES: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("client.toml", ClientSettings, "Each member decides, for itself alone. Paths are relative to the file."),
    (
        "federation.toml",
        FederationConfig,
        "The consortium decides, all members together, before founding; `fedmosaic keys approve` signs it "
        "into `roster.json`. Members are added and revoked with `fedmosaic keys`; the terms stay.",
    ),
    (
        "server.toml",
        OperatorSettings,
        "The server's operator decides. It lies in the server's kit; paths are relative to that.",
    ),
    (
        "witness.toml",
        WitnessSettings,
        "Where `federation.toml` names a witness, whoever runs it decides. Paths are relative to the file.",
    ),
)
INTRODUCTION = """# Configuration

Every key of every file: meaning, type, default and range. The files are TOML, or JSON by their ending. An
unknown key is an error. `required` means that there is no default. This page is written by `make docs` from
the models that read the files; do not edit it.
"""
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
_PATTERNED = {"HubData": "`hub:NAME:SPLIT`"}


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, model, who in FILES:
        parts.append(f"## {name}\n\n{who}\n")
        parts += _tables(model, "", {})
    return "\n".join(parts)


def _tables(model: type[BaseModel], table: str, seen: dict[type[BaseModel], str]) -> Iterator[str]:
    """The table of a model's keys, then those of the models below it."""
    meanings, below, rows = _meanings(model), [], []
    for name, field in model.model_fields.items():
        nested = _models_in(field.annotation)
        whole = f"{table}.{name}" if table else name
        if nested and not _is_text(nested):
            below += [(whole, each, _many(field), meanings.get(name, "")) for each in nested]
            continue
        rows.append(f"| `{name}` | {meanings[name]} | {_kind(field)} | {_default(field)} | {_range(field)} |")
    if rows:
        head = "| key | meaning | type | default | range |\n| --- | --- | --- | --- | --- |\n"
        yield head + "\n".join(rows) + "\n"
    for name, each, many, meaning in below:
        kind = _discriminator(each)
        title = f"[[{name}]]" if many else f"[{name}]"
        said = f"### `{title}`" + (f' with `backend = "{kind}"`' if kind else "")
        if each in seen:
            yield f"{said}\n\n{meaning} Keys as in `[{seen[each]}]`.\n"
            continue
        seen[each] = name
        yield f"{said}\n\n{meaning or _summary(each)}\n"
        yield from _tables(each, name, seen)


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """What every key of a model means; the model's own words win over those of the models that it extends."""
    found: dict[str, str] = {}
    for each in reversed(
        [base for base in model.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]
    ):
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(parsed, ast.ClassDef)  # noqa: S101  # what getsource gave
        attributes = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE):
            found[name] = _sentence(text)
        for field, after in zip(parsed.body, parsed.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and (text := _text(after))
            ):
                found[field.target.id] = _sentence(text)
    lacking = [
        name
        for name in model.model_fields
        if name not in found and not _models_in(model.model_fields[name].annotation)
    ]
    if lacking:
        raise SystemExit(f"{model.__name__}: say what {', '.join(lacking)} means, below the field")
    return found


def _text(statement: ast.stmt) -> str:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _sentence(text: str) -> str:
    words = " ".join(text.replace("``", "`").split()).replace("|", "\\|")
    # A letter alone is a symbol, r or ε, and keeps its case.
    return words[:1].upper() + words[1:] if re.match("[a-z]{2}", words) else words


def _summary(model: type[BaseModel]) -> str:
    lines = inspect.cleandoc(model.__doc__ or "").partition("\n\nAttributes:")[0]
    return "\n\n".join(_sentence(part) for part in lines.split("\n\n"))


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of a type, without None and what is annotated to it."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for each in get_args(annotation) for part in _parts(each)]
    return [annotation]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for part in _parts(annotation):
        if get_origin(part) is tuple:
            found += _models_in(get_args(part)[0])
        elif isinstance(part, type) and issubclass(part, BaseModel):
            found.append(part)
    return found


def _is_text(nested: list[type[BaseModel]]) -> bool:
    return all(model.__name__ in _PATTERNED for model in nested)


def _many(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _discriminator(model: type[BaseModel]) -> str:
    backend = model.model_fields.get("backend")
    return str(backend.default) if backend else ""


def _kind(field: FieldInfo) -> str:
    return _type(field.annotation)


def _type(annotation: Any) -> str:
    names = []
    for part in _parts(annotation):
        origin, arguments = get_origin(part), get_args(part)
        if origin is Literal:
            names.append(" \\| ".join(f"`{_shown(value)}`" for value in arguments))
        elif origin is tuple:
            names.append(f"list of {_type(arguments[0])}")
        elif origin is dict:
            names.append(f"table: {_type(arguments[0])} = {_type(arguments[1])}")
        elif part is not NoneType:
            names.append(_PATTERNED.get(part.__name__) or _NAMES[part])
    return " or ".join(dict.fromkeys(names))


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "empty"
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    return f"`{_shown(field.default)}`"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(field: FieldInfo) -> str:
    found = {"gt": "", "ge": "", "lt": "", "le": "", "min": "", "pattern": ""}
    for each in [*field.metadata, *_inner(field.annotation)]:
        for name, kind in (("gt", "Gt"), ("ge", "Ge"), ("lt", "Lt"), ("le", "Le")):
            if isinstance(each, getattr(annotated_types, kind)):
                limit = getattr(each, name)
                found[name] = f"{limit:,}" if isinstance(limit, int) and limit < 1e12 else f"{limit:g}"
        if isinstance(each, annotated_types.MinLen) and each.min_length:
            found["min"] = str(each.min_length)
        found["pattern"] = found["pattern"] or (getattr(each, "pattern", None) or "")
    limits = [f"above {found['gt']}"] * bool(found["gt"]) + [f"at least {found['ge']}"] * bool(found["ge"])
    limits += [f"below {found['lt']}"] * bool(found["lt"]) + [f"at most {found['le']}"] * bool(found["le"])
    if found["min"] and not found["pattern"]:
        limits.append("not empty")
    if found["pattern"]:
        limits.append("`" + str(found["pattern"]).replace("|", "\\|") + "`")
    return ", ".join(limits)


def _inner(annotation: Any) -> list[Any]:
    """What is annotated to the alternatives of a type, where pydantic does not lift it to the field."""
    if get_origin(annotation) is Annotated:
        return [*get_args(annotation)[1:], *_inner(get_args(annotation)[0])]
    if get_origin(annotation) in (Union, UnionType):
        return [found for each in get_args(annotation) for found in _inner(each)]
    return []


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
