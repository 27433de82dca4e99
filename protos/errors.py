"""The one tree of errors raised on purpose. A message says what was wrong, the value, what to do.

Nothing private.
"""

from typing import Final

NOTHING_EXCHANGED: Final = 3
"""Exit status, of server and client, of a run that is over and brought nothing from the others."""


class FedMosaicError(Exception):
    """Root of every error raised on purpose by this package."""


class ConfigurationError(FedMosaicError):
    """A configuration file, an option or a combination of them is wrong."""


class IdentityError(FedMosaicError):
    """A certificate, key, signature or roster is not acceptable."""


class WireError(FedMosaicError):
    """Bytes from the network break a bound or a format."""


class TransportError(FedMosaicError):
    """The other side cannot be reached in time."""


class RefusedError(TransportError):
    """The server answered with a refusal that retrying cannot change."""


class PolicyError(FedMosaicError):
    """The aggregation policy forbids what was asked for."""


class WitnessError(PolicyError):
    """An aggregate lacks the countersignature of the federation's witness, or has one over something else."""


class PrivacyError(FedMosaicError):
    """A privacy rule would be broken."""


class MechanismError(PrivacyError):
    """A privacy mechanism was described or used wrongly."""


class AccountingError(PrivacyError):
    """An ε cannot be computed soundly from what was given."""


class LedgerError(PrivacyError):
    """The ledger of releases is damaged or misused."""


class BudgetExceededError(PrivacyError):
    """A release would pass the privacy budget; raised before any noise is drawn."""


class EncryptionError(FedMosaicError):
    """Keys or ciphertexts are not acceptable."""


class KeyAgreementError(EncryptionError):
    """The group key could not be agreed on with exactly the pinned members."""


class KeyExpiredError(KeyAgreementError):
    """The group key may not encrypt any more: it is too old, or the members have changed."""


class CiphertextError(EncryptionError):
    """An encrypted record is malformed, altered, stale or foreign."""


class StateError(FedMosaicError):
    """State on disk is missing, damaged or belongs to another run."""


class ModelError(FedMosaicError):
    """A model or an adapter cannot be used as configured."""


class TrainingError(ModelError):
    """Training left the finite numbers, or moved nothing; `steps` of the optimizer were spent on it."""

    def __init__(self, message: str, steps: int) -> None:
        super().__init__(message)
        self.steps = steps
