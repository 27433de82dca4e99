"""What all tests share: the devices of this machine, and how property tests draw their examples."""

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:  # the process that hands tests out to workers needs none of it
    import torch

# A slow or busy machine says nothing about the code, so no example has a deadline. The same few examples
# every time tell what a change has broken; `make test-slow` looks for new ones, and prints how to repeat
# the one it finds.
repeatable = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=50
)
settings.register_profile("repeatable", repeatable)
settings.register_profile("searching", repeatable, derandomize=False, print_blob=True, max_examples=300)
settings.load_profile("repeatable")


# A model's libraries make a million objects that stay to the end: no collection is to walk over them, neither
# while test modules import them, nor in every test, nor when the process ends.
def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _devices() -> Iterator[object]:
    import torch

    yield pytest.param("cpu", id="cpu")
    # The marks let `make test-gpu` run these alone.
    if torch.cuda.is_available():
        yield pytest.param("cuda:0", id="cuda", marks=pytest.mark.gpu)
    if torch.backends.mps.is_available():
        yield pytest.param("mps", id="mps", marks=pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", list(_devices()), indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> "torch.device":
    """Each device that this machine has: a privacy test that touches tensors runs on all of them."""
    import devices

    return devices.choose(request.param)
