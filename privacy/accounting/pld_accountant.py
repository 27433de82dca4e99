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
    """Composes the history of an Opacus `PrivacyEngine` through privacy loss distributions.

    Once registered, `PrivacyEngine(accountant="pld")` and `create_accountant("pld")` work.
    """

    def __init__(self) -> None:
        super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one step; equal steps share one row of the history wherever they stand."""
        for index, (sigma, rate, steps) in enumerate(self.history):
            if (sigma, rate) == (noise_multiplier, sample_rate):
                self.history[index] = (sigma, rate, steps + 1)
                return
        self.history.append((noise_multiplier, sample_rate, 1))

    def get_epsilon(self, delta: float, *, interval: float | None = None, **kwargs: Any) -> float:
        """ε at δ: an upper bound up to floating point.

        Args:
            delta: δ in (0, 1).
            interval: grid of privacy losses; chosen from the history when not given.
            **kwargs: options of other accountants that Opacus passes on; not used.

        Returns:
            ε ≥ 0; 0 for an empty history, ∞ when a step has no noise.
        """
        events = merge_events(GaussianEvent(*row) for row in self.history)
        if not events:
            return 0.0
        if not all(event.is_private for event in events):
            return float("inf")
        if interval is None:
            largest = _largest_loss(events, delta)
            interval = pld.discretization_interval(events, largest)
        return float(pld.compose(events, interval).get_epsilon_for_delta(delta))

    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    def mechanism(cls) -> str:
        """Name under which Opacus knows this accountant."""
        return "pld"


def _largest_loss(events: tuple[GaussianEvent, ...], delta: float) -> float:
    rdp = create_accountant("rdp")
    rdp.history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in events]
    return float(rdp.get_epsilon(delta))


def register() -> None:
    """Make "pld" known to Opacus; calling it again changes nothing.

    Raises:
        AccountingError: other code has registered a different accountant under this name.
    """
    try:
        register_accountant("pld", PLDAccountant)
    except ValueError:
        if not isinstance(create_accountant("pld"), PLDAccountant):
            raise AccountingError(
                "Opacus already has another accountant named 'pld'; remove that registration, because the "
                "cross-check must not depend on unknown code"
            ) from None
