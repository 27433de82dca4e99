"""Mechanisms, accounting, ledger, identities, encryption and the privacy statement.

    privacy.epsilon([privacy.GaussianEvent(8, 1, 1)], delta=1e-5)     # ε of releases
    privacy.Ledger.open(...)                                          # the durable record of a data set's
    privacy.privacy_statement(inputs)                                 # who learns what, at which ε

Each name here is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmosaic.privacy.accounting.epsilon import epsilon as epsilon
    from fedmosaic.privacy.accounting.events import GaussianEvent as GaussianEvent
    from fedmosaic.privacy.ledger.ledger import Ledger as Ledger
    from fedmosaic.privacy.statement.build import statement as privacy_statement

__all__ = ["GaussianEvent", "Ledger", "epsilon", "privacy_statement"]

# `statement` is the sub-package; the function that makes one has a name of its own here.
_PLACES = {
    "GaussianEvent": ("fedmosaic.privacy.accounting.events", "GaussianEvent"),
    "Ledger": ("fedmosaic.privacy.ledger.ledger", "Ledger"),
    "epsilon": ("fedmosaic.privacy.accounting.epsilon", "epsilon"),
    "privacy_statement": ("fedmosaic.privacy.statement.build", "statement"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module 'fedmosaic.privacy' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
