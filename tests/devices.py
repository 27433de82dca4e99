"""The device that a test of privacy computes on now; the fixture `device` goes through all there are."""

from typing import Final, TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)
CHOSEN: Final = [torch.device("cpu")]


def choose(name: str) -> torch.device:
    """Compute on the device of this name from now on."""
    CHOSEN[0] = torch.device(name)
    return CHOSEN[0]


def here(module: AnyModule, dtype: torch.dtype | None = None) -> AnyModule:
    """The module, moved to the device, and to a dtype."""
    return module.to(CHOSEN[0], dtype)
