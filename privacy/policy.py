"""What a weight row must look like before anyone computes or decrypts an aggregate with it.

With two contributors the aggregate of one *is* the adapter of the other, whatever the cryptography. Only
these rules protect against that, so the party that can refuse, the client, checks them itself; the server
fails early.

A client sees its own row only. A server that does not keep its word, with two recipients, has any adapter it
likes: rows (v, x, x) and (v', x', x') each keep every rule, and a difference of them is V alone.
"""

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmosaic.privacy.configuration import Frozen
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import PolicyError
from fedmosaic.protos.messages import WeightRow


class AggregationPolicy(Frozen):
    """Limits on every weight row, the same for all recipients and part of the roster's hash.

    Attributes:
        minimum_contributors: Least number of members other than the recipient with a weight above zero.
        weight_cap: Largest share of one contributor, in (0, 1].
        squares_cap: Largest sum Σ w² of the squared shares, in (0, 1]; 1 / Σ w² is the effective number of
            contributors. Two shares together are at most √(2 · squares_cap): by default 0.85 of any row, and
            0.8 of a row of three.
    """

    minimum_contributors: int = Field(default=3, ge=1)
    weight_cap: float = Field(default=0.5, gt=0.0, le=1.0, allow_inf_nan=False)
    squares_cap: float = Field(default=0.36, gt=0.0, le=1.0, allow_inf_nan=False)

    @property
    def fewest_contributors(self) -> int:
        """Contributors other than the recipient without which no row can keep all limits."""
        by_weight, by_squares = _fewest_under(self.weight_cap), math.ceil(1 / Fraction(self.squares_cap))
        return max(self.minimum_contributors, by_weight, by_squares)

    @property
    def withstands(self) -> int:
        """Recipients who, put together, solve for no adapter with the rows of one round.

        Promised where the server keeps to its plan: k recipients that are one another's contributors hold
        k equations in at least `fewest_contributors` − (k − 1) unknown adapters. Two is as far as rows are
        planned.
        """
        return min(2, self.fewest_contributors // 2)


def check_row(
    recipient: str,
    row: WeightRow,
    policy: AggregationPolicy,
    *,
    members: Collection[str] | None = None,
    families: Mapping[str, str] | None = None,
    bits: int | None = None,
) -> None:
    """Refuse, with a PolicyError, a row that reveals too much of one contributor, or names somebody else.

    Where they are given, every contributor must be one of the pinned `members` of the epoch and of the
    recipient's family (`families` has that within which alone a member shares), and the row must have the
    `bits` of the agreed encryption parameters. Its shape was checked when it was made.
    """
    if bits is not None and row.bits != bits:
        raise PolicyError(f"weight row has {row.bits} bits, the agreed parameters have {bits}")
    if members is not None and (foreign := set(row.contributors).difference(members)):
        raise PolicyError(f"weight row names contributors outside the roster: {', '.join(sorted(foreign))}")
    if families is not None:
        own = families[recipient]
        if strangers := sorted(name for name in row.contributors if families.get(name) != own):
            raise PolicyError(f"weight row of family {own!r} names members of others: {', '.join(strangers)}")
    if recipient in row.contributors and row.weights[row.contributors.index(recipient)] > 0:
        raise PolicyError(f"recipient {recipient!r} is weighted in its own row: its own weight must be 0")
    contributing = len(row.weights) - row.weights.count(0)
    if contributing < policy.minimum_contributors:
        raise PolicyError(
            f"weight row has {contributing} contributors other than the recipient, at least "
            f"{policy.minimum_contributors} are required: the aggregate would reveal single adapters"
        )
    # Largest-remainder rounding may lift a share at the cap by less than one unit.
    largest = max(row.weights)
    if largest > math.ceil(policy.weight_cap * (1 << row.bits)):
        raise PolicyError(
            f"contributor {row.contributors[row.weights.index(largest)]!r} has a share of "
            f"{largest / (1 << row.bits):.4f}, above the cap of "
            f"{policy.weight_cap}: cap and renormalise the row"
        )
    squares = Fraction(sum(map(operator.mul, row.weights, row.weights)), 1 << 2 * row.bits)
    if squares > Fraction(policy.squares_cap):
        raise PolicyError(
            f"the squared weights of the row sum to {float(squares):.4f}, above the cap of "
            f"{policy.squares_cap}: {float(1 / squares):.2f} contributors in effect, where "
            f"{1 / policy.squares_cap:.2f} are required; spread the row"
        )


def cap_weights(weights: Sequence[float], cap: float) -> tuple[float, ...]:
    """Clip (m,) weights to a cap and hand the excess to the others, in proportion, until all fit.

    The result, shares in [0, cap] that sum to 1, is the row with the least Kullback-Leibler divergence from
    the normalised input among all that respect the cap (water filling). Zeros stay zero. PolicyError if a
    weight is not usable, or too few are above zero for the cap to hold.
    """
    if not 0.0 < cap <= 1.0:
        raise PolicyError(f"weight cap is {cap!r}, expected a number in (0, 1]")
    if any(not (math.isfinite(weight) and weight >= 0.0) for weight in weights):
        raise PolicyError("weights must be finite and not negative")
    positive = sorted((i for i, weight in enumerate(weights) if weight > 0.0), key=lambda i: -weights[i])
    if len(positive) < _fewest_under(cap):
        raise PolicyError(
            f"{len(positive)} contributors with a weight above zero cannot each stay at or below {cap}: "
            f"at least {_fewest_under(cap)} are needed; the recipient gets no aggregate this round"
        )
    shares = [0.0] * len(weights)
    remaining, budget = positive, 1.0
    while remaining:
        relative = [weights[index] / weights[remaining[0]] for index in remaining]
        total = math.fsum(relative)
        if budget <= cap * total:
            # Largest first: when that one fits under the cap, all later ones do.
            for index, share in zip(remaining, relative, strict=True):
                shares[index] = share / total * budget
            break
        shares[remaining[0]] = cap
        remaining = remaining[1:]
        budget = 1.0 - (len(positive) - len(remaining)) * cap
    return tuple(shares)


def spread_weights(shares: Sequence[float], squares_cap: float, bits: int) -> tuple[float, ...]:
    """Mix shares with equal ones, as little as possible, until the sum of their squares keeps a cap.

    With s = Σ w² over n shares above zero, (1 − λ) w + λ / n has the sum 1/n + (1 − λ)² (s − 1/n). It is the
    nearest row, in Euclidean distance, that keeps the cap; the order of the shares is kept, and zeros stay.
    Room is left for rounding to `bits`. PolicyError if too few are above zero for the cap to hold.
    """
    count = sum(share > 0.0 for share in shares)
    if count * Fraction(squares_cap) < 1:
        raise PolicyError(
            f"the squared weights of {count} contributors cannot sum to {squares_cap} or less: at least "
            f"{math.ceil(1 / Fraction(squares_cap))} are needed; the recipient gets no aggregate this round"
        )
    even = 1.0 / count
    # Rounding moves every share by less than a unit u = 2^-bits, so Σ w² by less than 2 u Σ w + n u².
    limit = max(even, squares_cap - math.ldexp(2.0, -bits) - math.ldexp(count, -2 * bits))
    squares = math.fsum(share * share for share in shares)
    if squares <= limit:
        return tuple(shares)
    kept = math.sqrt((limit - even) / (squares - even))
    return tuple(kept * share + (1.0 - kept) * even if share > 0.0 else 0.0 for share in shares)


def integer_weights(row: NDArray[np.float64], bits: int) -> NDArray[np.int64]:
    """Round (m,) shares ≥ 0 that sum to 1 within 1e-6 to integers that sum to 2**bits, by largest remainder.

    Every integer differs from its exact share by less than one; zeros stay zero, equal remainders are served
    in order of position. PolicyError if it is no row of shares.
    """
    shares = np.asarray(row, dtype=np.float64)
    if not 1 <= bits <= bounds.MAX_WEIGHT_BITS:
        raise PolicyError(f"weights of {bits} bits were asked for, expected 1 to {bounds.MAX_WEIGHT_BITS}")
    if shares.ndim != 1 or shares.size == 0:
        raise PolicyError(f"a weight row has shape {shares.shape}, not (m,) with a contributor or more")
    if not np.isfinite(shares).all() or (shares < 0.0).any():
        raise PolicyError("weights must be finite and not negative")
    total = float(shares.sum())
    if abs(total - 1.0) > 1e-6:
        raise PolicyError(f"weights sum to {total:.9g}, expected 1: normalise the row first")
    scaled = shares / total * (1 << bits)
    integers = np.floor(scaled).astype(np.int64)
    missing = (1 << bits) - int(integers.sum())
    by_remainder = np.argsort(integers - scaled, kind="stable")
    integers[by_remainder[:missing]] += 1
    return integers


def _fewest_under(cap: float) -> int:
    """Shares of at most `cap` that are needed to make up a whole; a cap of 1/3 in float64 is met by three."""
    return math.ceil(1.0 / cap - 1e-12)
