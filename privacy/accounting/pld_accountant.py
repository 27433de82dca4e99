"""Google's privacy loss distribution accountant as an Opacus accountant named "pld".

Importing this module imports opacus, and with it torch; `fedmosaic.privacy.accounting.epsilon` does so only
when an ε is asked for.
"""

from typing import Any

from opacus.accountants import IAccountant, create_accountant, register_accountant

from fedmosaic.privacy.accounting import pld
from fedmosaic.privacy.accounting.events import GaussianEvent, merge_events
from fedmosaic.protos.errors import AccountingError


class PLDAccountant(IAccountant):  # type: ignore[misc]  # opacus ships no types
    """Composes the history of an Opacus `PrivacyEngine` through privacy loss distributions."""

    def __init__(self) -> None:
        super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one step; equal steps share one row of the history wherever they stand."""
        for index, (sigma, rate, steps) in enumerate(self.history):
            if (sigma, rate) == (noise_multiplier, sample_rate):
                self.history[index] = (sigma, rate, steps + 1)
                return
        self.history.append((noise_multiplier, sample_rate, 1))

    def get_epsilon(self, delta: float, *, interval: float | None = None, **_: Any) -> float:
        """ε at δ, an upper bound up to floating point; on a grid chosen from the history if none is given."""
        events = merge_events(GaussianEvent(*row) for row in self.history)
        if not events:
            return 0.0
        if not all(event.is_private for event in events):
            return float("inf")
        if interval is None:
            rdp = create_accountant("rdp")
            rdp.history = self.history
            interval = pld.discretization_interval(events, float(rdp.get_epsilon(delta)))
        return float(pld.compose(events, interval).get_epsilon_for_delta(delta))

    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """Name under which Opacus knows this accountant."""
        return "pld"


def register() -> None:
    """Make "pld" known to Opacus, once; AccountingError if other code has taken the name."""
    try:
        register_accountant("pld", PLDAccountant)
    except ValueError:
        if not isinstance(create_accountant("pld"), PLDAccountant):
            raise AccountingError(
                "Opacus already has another accountant named 'pld'; remove that registration, because the "
                "cross-check must not depend on unknown code"
            ) from None
