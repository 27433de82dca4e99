"""What all tests share: the devices of this machine."""

from collections.abc import Iterator

import pytest
import torch

import devices


def _devices() -> Iterator[object]:
    yield pytest.param("cpu", id="cpu")
    # The marks let `make test-gpu` run these alone.
    if torch.cuda.is_available():
        yield pytest.param("cuda:0", id="cuda", marks=pytest.mark.gpu)
    if torch.backends.mps.is_available():
        yield pytest.param("mps", id="mps", marks=pytest.mark.gpu)


@pytest.fixture(scope="session", params=list(_devices()))
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has: a privacy test that touches tensors runs on all of them."""
    chosen = torch.device(request.param)
    devices.choose(chosen)
    return chosen
