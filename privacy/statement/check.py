"""Privacy statements that came from somebody else: believed by nobody before they pass here.

One member can neither speak for another nor spoil what the others are shown.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Final

from pydantic import BaseModel, ValidationError

from fedmosaic.privacy.statement import models
from fedmosaic.privacy.statement.models import ClientStatement, PrivacyStatement
from fedmosaic.protos.errors import PrivacyError

_SHOWN: Final = 120
_LARGEST: Final = 1e200
"""Finite figures are between this and its inverse: beyond, a rounding for display overflows."""


def check_received(content: object, client: str, run_id: str | None = None) -> PrivacyStatement:
    """Check a statement (parsed JSON) that a member is said to have made, about a run if it is known."""
    try:
        statement = PrivacyStatement.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "(all of it)"
        raise PrivacyError(f"it is no privacy statement: {_line(where)}: {_line(first['msg'])}") from None
    if run_id is not None and statement.run_id != run_id:
        raise PrivacyError(f"it is about run {_line(statement.run_id)}, not about {run_id}")
    names = [each.client_id for each in statement.clients]
    if names != [client]:
        shown = ", ".join(_line(name) for name in names[:3]) or "nobody"
        raise PrivacyError(f"it is about {shown} where it has to be about {client} and nobody else")
    _check_table(statement.clients[0])
    for where, value in _leaves(statement, ""):
        if isinstance(value, str) and not (value.isprintable() or not value):
            raise PrivacyError(f"its {where} has characters that cannot be printed")
        # Compared as it is: an integer may be beyond every float.
        if isinstance(value, int | float) and not (
            value in (0, math.inf) or 1 / _LARGEST <= abs(value) <= _LARGEST
        ):
            raise PrivacyError(f"its {where} is no figure that can be shown")
    return statement


def _check_table(client: ClientStatement) -> None:
    channels = [each.channel for each in client.channels]
    if not channels or channels[-1] != "joint" or len(set(channels)) != len(channels):
        raise PrivacyError("its channels have to be different ones, the joint one last")
    pairs = {(each.channel, each.adversary) for each in client.guarantees}
    missing = sorted(set(itertools.product(channels, models.ADVERSARIES)) - pairs)
    if missing:
        raise PrivacyError(f"it has no guarantee for channel {missing[0][0]} against {missing[0][1]}")


def _leaves(value: object, where: str) -> Iterator[tuple[str, object]]:
    """Every text and number of a statement with the name of its field. The model bounds the depth."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), name)
    elif isinstance(value, tuple):
        for each in value:
            yield from _leaves(each, where)
    else:
        yield where, value


def _line(text: str) -> str:
    shown = ascii(text)[1:-1] if not text.isprintable() else text
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
