"""Where a model computes and in which floating point type; what is chosen is logged with its reason."""

import functools
import logging
import time
from typing import Final

import torch
from torch.nn import functional

from fedmosaic.protos.errors import ModelError

log = logging.getLogger(__name__)
_PRODUCTS: Final = 4


def choose_device(wanted: str = "auto") -> torch.device:
    """The device that a `fedmosaic.client.settings.DeviceName` names; ModelError if this machine lacks it."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, number = wanted.partition(":")
    count = {"cpu": 1, "mps": int(mps), "cuda": torch.cuda.device_count() if cuda else 0}.get(kind, 0)
    if int(number or 0) >= count:
        present = [f"cuda:{i}" for i in range(torch.cuda.device_count() if cuda else 0)] + ["mps"] * mps
        raise ModelError(
            f"device is {wanted!r}, which this machine does not have; it has {', '.join([*present, 'cpu'])}"
            f" (PyTorch {torch.__version__}). Name one of them, or auto"
        )
    return torch.device(kind, int(number or 0)) if kind == "cuda" else torch.device(kind)


def choose_dtype(wanted: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The type of frozen weights that a `settings.DtypeName` names, on a device; ModelError if none."""
    if wanted != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        name = str(wanted).removeprefix("torch.")
        if name not in known:
            raise ModelError(f"dtype is {wanted}; choose one of {', '.join(known)} or auto")
        return known[name]
    if device.type == "cuda":
        # Emulated bfloat16 is slower than float32, so it does not count.
        narrow = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = f"{torch.cuda.get_device_name(device)} {'has' if narrow else 'has no'} bfloat16 units"
    else:
        seconds = {dtype: product_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
        narrow = seconds[torch.bfloat16] < seconds[torch.float32]
        reason = (
            f"a small product took {1e6 * seconds[torch.bfloat16]:.0f} µs in bfloat16, "
            f"{1e6 * seconds[torch.float32]:.0f} µs in float32"
        )
    log.info("dtype auto on %s: %s, since %s", device, "bfloat16" if narrow else "float32", reason)
    return torch.bfloat16 if narrow else torch.float32


@functools.cache
def product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Best time of several products of the size of a small decoder's.

    Processors with bfloat16 units (AVX-512 BF16, AMX) are two to three times as fast in bfloat16; those
    without are about ten times as slow. A processor's name does not tell which, a product does. There its own
    time counts, measured once in a process, so that other work on a busy machine does not decide.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    inputs = torch.zeros(128, 576, dtype=dtype, device=device)
    weight = torch.zeros(1536, 576, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_PRODUCTS):
        start = clock()
        functional.linear(inputs, weight)
        synchronise(device)
        best = min(best, clock() - start)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def exact_products() -> None:
    """Have every product computed in the type of its factors and added up in float32, in this process.

    TF32 keeps 10 bits of a factor, and half-precision sums of half-precision products drop more: both are
    fast and both put errors of a per mille into gradients whose norm is what the privacy guarantee bounds.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
