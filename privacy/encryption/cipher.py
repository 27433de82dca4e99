"""The client's side of every back end: one interface, and all checks around the payload."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmosaic.privacy.encryption import records
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, PlainParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.groupkey.key import GroupKey
from fedmosaic.privacy.policy import AggregationPolicy, check_row
from fedmosaic.protos.errors import CiphertextError, EncryptionError
from fedmosaic.protos.messages import WeightRow

# A decrypted sum of clipped values may pass the clip by the noise of approximate decryption, no more.
RANGE_TOLERANCE = 1e-4

P = TypeVar("P", CkksParameters, MaskParameters, PlainParameters)


class ClientCipher(ABC, Generic[P]):
    """Encrypts uploads; checks and decrypts aggregates. One per client process."""

    def __init__(self, parameters: P, client: str, policy: AggregationPolicy) -> None:
        self.parameters: P = parameters
        self.client = client
        self.policy = policy

    def encrypt(
        self, vector: NDArray[np.floating], key: GroupKey | None, context: RoundContext, nonce: bytes
    ) -> bytes:
        """Encrypt (d,) finite values, clipped to ±clip, for the members of the key's epoch.

        The upload's length depends on d alone. The 16-byte nonce is from `NonceCounter.take`; only `plain`
        has no key.
        """
        self._check_key(key, context)
        values = self._checked(vector, context)
        header = records.upload_header(self.parameters, context, self.client).encode(nonce)
        return header + self._seal(values, key, header, nonce)

    def decrypt(
        self, record: bytes | memoryview, key: GroupKey | None, context: RoundContext, row: WeightRow
    ) -> NDArray[np.float64]:
        """Check the weight row and the record, both as received, then decrypt this client's aggregate, (d,).

        Under `ckks` an approximate decryption and its ciphertext together reveal the key: the caller keeps
        the vector, and whatever determines it, inside the process. PolicyError if the row breaks the policy:
        nothing is decrypted then.
        """
        self._check_key(key, context)
        members = None if key is None else key.members
        bits = self.parameters.weight_bits
        check_row(self.client, row, self.policy, members=members, bits=bits)
        header = records.aggregate_header(self.parameters, context, row, self.client)
        digest, payload = records.read_record(
            record, header, records.aggregate_payload_bytes(self.parameters, header)
        )
        if digest != records.row_digest(row, self.client, context.round):
            raise CiphertextError("the aggregate was made with another weight row than the one received")
        values = self._open(payload, key, context, row)
        # Written so that NaN fails too.
        if not np.abs(values).max() <= self.parameters.clip + RANGE_TOLERANCE:
            raise out_of_range(context, self.parameters.clip)
        return values

    @abstractmethod
    def _seal(self, values: NDArray[np.float64], key: GroupKey | None, header: bytes, nonce: bytes) -> bytes:
        """Return the payload of an upload of (d,) checked values under an encoded header."""

    @abstractmethod
    def _open(
        self, payload: memoryview, key: GroupKey | None, context: RoundContext, row: WeightRow
    ) -> NDArray[np.float64]:
        """Return the (d,) values of an aggregate's payload of the right length."""

    def _check_key(self, key: GroupKey | None, context: RoundContext) -> None:
        backend = self.parameters.backend
        if key is None:
            if backend != "plain":
                raise EncryptionError(f"back end {backend!r} needs a group key: finish the agreement first")
            return
        if key.parameters_hash != self.parameters.digest():
            raise EncryptionError("the key was agreed for other encryption parameters: start a new epoch")
        if (key.federation, key.epoch) != (context.federation, context.epoch):
            raise EncryptionError(
                f"the group key is of federation {key.federation!r}, epoch {key.epoch}; the exchange is of "
                f"{context.federation!r}, epoch {context.epoch}"
            )
        if self.client not in key.members:
            raise EncryptionError(f"client {self.client!r} is not a member of key epoch {key.epoch}")

    def _checked(self, vector: NDArray[np.floating], context: RoundContext) -> NDArray[np.float64]:
        values = np.asarray(vector, dtype=np.float64)
        if values.shape != (context.dimensions,):
            raise EncryptionError(f"vector has shape {values.shape}, expected ({context.dimensions},)")
        if not np.isfinite(values).all():
            raise EncryptionError("the vector is not finite: training diverged, lower the learning rate")
        return np.clip(values, -self.parameters.clip, self.parameters.clip)


def out_of_range(context: RoundContext, clip: float) -> CiphertextError:
    """The error for an aggregate that no honest uploads, weights and key can have produced."""
    return CiphertextError(
        f"the aggregate of round {context.round} decrypts outside ±{clip}: an upload, the weights or the "
        "aggregate were altered, or members hold different keys; drop it, report it, start a new key epoch"
    )
