"""Rounding to significant decimal digits in one direction, so that what is told stays true."""

import math
from collections.abc import Callable


def round_up(value: float, digits: int) -> float:
    """The smallest number of `digits` significant decimal digits that is not below `value` (≥ 0)."""
    return _rounded_to(value, digits, math.ceil)


def round_down(value: float, digits: int) -> float:
    """The largest number of `digits` significant decimal digits that is not above `value` (≥ 0)."""
    return _rounded_to(value, digits, math.floor)


def _rounded_to(value: float, digits: int, towards: Callable[[float], int]) -> float:
    if value == 0 or not math.isfinite(value):
        return value
    exponent = digits - 1 - math.floor(math.log10(value))
    scaled = towards(round(value * 10.0**exponent, 9))
    return float(f"{scaled}e{-exponent}")
