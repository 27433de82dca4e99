"""The releases of a client, charged to the ledger before they exist.

The order is always: finish the private sum, charge (durably, or be refused), draw noise, store the noisy
bytes, mark them released, send. A crash in between wastes budget and never forgets any; bytes that are
stored are sent again as they are, free of charge.
"""

import hashlib
import io
import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmosaic.client.clipping import CLIPPING, ClippingRecord
from fedmosaic.client.ledger import ServerAnchor
from fedmosaic.client.state import ClientState, hold_directory
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.privacy.federation.roster import Terms
from fedmosaic.privacy.federation.terms_checks import plan_inputs
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.ledger.rows import Channel, Coverage, data_epoch
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.mechanism.profile import (
    Float32Array,
    ProfileMechanism,
    ReleasedProfile,
    update_average,
)
from fedmosaic.protos.errors import BudgetExceededError, PrivacyError, StateError
from fedmosaic.protos.messages import Profile

log = logging.getLogger(__name__)
_ARRAY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Everything that NumPy says of a file that is no array, or no archive of arrays."""

_LOST_PROFILE = (
    "A fresh draw would cost its ε again: put the file back from a backup of the ledger, or change "
    "the data by an example, which makes another release that is charged"
)

Randomness = SecureNoise | SeededTestNoise
MakeRelease = Callable[[Callable[[], None]], Float32Array]
"""Makes one release of the profile; calls its argument once, after the private sum and before the noise."""


@dataclass(frozen=True)
class AdapterPlan:
    """DP-SGD parameters of this client, planned once for the whole run.

    Attributes:
        noise_multiplier: σ, noise over clipping norm; 0 where the adapter is not trained privately.
        sampling_rate: q, expected batch size over the number of examples.
    """

    noise_multiplier: float
    sampling_rate: float


def budgeted_channels(terms: Terms) -> tuple[Channel, ...]:
    """Channels that a budget can bound: without DP on the adapter, its ε is ∞ whatever the budget."""
    return ("profile", "adapter") if terms.adapter.private else ("profile",)


def sampling_rate(terms: Terms, examples: float) -> float:
    """Poisson sampling rate q of DP-SGD: the expected batch size over the number of examples."""
    return min(1.0, terms.adapter_privacy.expected_batch_size / examples)


def plan_adapter(terms: Terms, examples: float, delta: float, target_epsilon: float) -> AdapterPlan:
    """Find σ for all rounds from the budget that the profile leaves.

    Args:
        terms: schedule, batch size, profile mechanism.
        examples: number n of the client's examples.
        delta: δ of the budget.
        target_epsilon: ε of the whole experiment, both channels together.

    Returns:
        The plan; with σ = 0 where the terms do not train the adapter privately.

    Raises:
        AccountingError: the profile alone passes the target, or no noise suffices.
    """
    if not terms.adapter.private:
        return AdapterPlan(0.0, sampling_rate(terms, examples))
    settled, rate, steps = plan_inputs(terms, examples, terms.schedule.rounds)
    return AdapterPlan(noise_multiplier_for(target_epsilon, delta, settled, rate, steps), rate)


def profile_path(directory: Path, epoch: str, mechanism: ProfileMechanism) -> Path:
    """Where the noised task profile of a data epoch stands once it was released."""
    return directory / f"profile-{epoch[:16]}-{mechanism.sha256[:16]}.npy"


class Releases:
    """What one client has released and may still release."""

    def __init__(
        self,
        ledger: Ledger,
        terms: Terms,
        state: ClientState,
        example_ids: tuple[str, ...],
        make_profile: MakeRelease,
        randomness: Randomness,
        adapter_plan: AdapterPlan,
        *,
        disjoint_epochs: bool = False,
    ) -> None:
        """Begin, or go on with what the ledger and the state directory hold.

        Args:
            ledger: the client's own.
            terms: the roster's.
            state: the client's directory.
            example_ids: n ids of this data epoch.
            make_profile: draws the task profile.
            randomness: noise and Poisson samples.
            adapter_plan: DP-SGD parameters.
            disjoint_epochs: compose this data epoch in parallel with others that share no example with it,
                which the ledger proves or refuses. Right only where the epoch of an example does not depend
                on other examples, as with examples that arrive over time.
        """
        self.receive_only = False
        self.clipping = ClippingRecord(state.directory / CLIPPING)
        self.randomness = randomness
        self.anchor = ServerAnchor(ledger, state.record)
        self._ledger = ledger
        self._terms = terms
        self._state = state
        self._examples = len(example_ids)
        self._data_epoch = data_epoch(example_ids)
        self._evidence = example_ids if disjoint_epochs else None
        self._make_profile = make_profile
        self._plan = adapter_plan

    @property
    def adapter_plan(self) -> AdapterPlan:
        """The plan for DP-SGD; PrivacyError if the adapter is not trained privately."""
        if not self._plan.noise_multiplier > 0.0:
            raise PrivacyError("this run does not train the adapter with differential privacy")
        return self._plan

    def charge_adapter(self, round_number: int, event: GaussianEvent) -> None:
        """Charge a round of DP-SGD before its first noise is drawn; BudgetExceededError if refused."""
        self._ledger.reserve(
            "adapter",
            round_number,
            event,
            data_epoch=self._data_epoch,
            secure_noise=not self.randomness.is_test,
            mechanism={
                "name": "DP-SGD on P and Q",
                "expected_batch_size": self._terms.adapter_privacy.expected_batch_size,
            },
            clipping_norm=self._terms.adapter_privacy.clipping_norm,
            dimensions=self._terms.adapter.shared_dimensions,
            example_ids=self._evidence,
            context=self._run,
        )

    def adapter(self, round_number: int, vectors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Book the adapter sections that are about to leave.

        Args:
            round_number: round of the upload.
            vectors: section name → vector.

        Returns:
            What may leave: nothing in receive-only mode.
        """
        if self.receive_only or self._refused_before(round_number):
            return {}
        for name, vector in vectors.items():
            digest = hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()
            self._book("family" if name == "family" else "adapter", round_number, digest)
        return vectors

    @property
    def _run(self) -> str:
        """The run that this client has joined; its rounds are not those of an earlier run."""
        return self._state.record.run_id

    def _refused_before(self, round_number: int) -> bool:
        """Whether an earlier process was refused this round's training, and ended before it sent."""
        if not self._terms.adapter.private:
            return False
        return self._ledger.refused("adapter", round_number, self._data_epoch, self._run)

    def _book(self, channel: Channel, round_number: int, digest: str) -> None:
        done = self._ledger.release_of(channel, round_number, self._data_epoch, self._run)
        if done is not None:
            if done.reference is not None:
                self._ledger.resent(done.reference, digest, round_number)
            return
        pending = self._ledger.pending(channel, round_number, self._data_epoch, self._run)
        if pending is not None:
            self._ledger.released(pending.sequence, digest)
            return
        if self._terms.adapter.private:
            raise PrivacyError(
                f"round {round_number}: the adapter was not charged to the ledger, so it may not leave"
            )
        coverage: Coverage = "cryptography" if self._terms.adapter.encrypted else "nothing"
        sequence = self._ledger.reserve(
            channel,
            round_number,
            UNPROTECTED,
            data_epoch=self._data_epoch,
            secure_noise=True,
            covered_by=coverage,
            context=self._run,
        )
        self._ledger.released(sequence, digest)

    def profile(self, round_number: int) -> Profile | None:
        """The task profile to send, or None to let the server go on with the last one.

        Released once per data epoch and mechanism; while both are unchanged, later rounds and later runs
        re-use it.
        """
        if self._examples < self._terms.profile.minimum_examples:
            log.warning(
                "fewer than %d examples: no task profile is released, the server uses uniform weights",
                self._terms.profile.minimum_examples,
            )
            return None
        sent = self._state.directory / "profile-sent"
        # Another run on the same data may be about to release the same profile, which is charged once.
        lock = hold_directory(self._ledger.directory / "profile.lock", "", wait=True)
        try:
            released = self._released_profile(round_number)
        except BudgetExceededError as error:
            log.warning("%s; going on without a task profile", error)
            return None
        finally:
            lock.close()
        average = self._average(released)
        # Whatever else the file holds, the profile is sent once more, which costs nothing.
        if sent.exists() and sent.read_bytes() == average.last_release_sha256.encode():
            return None
        return Profile(average.vector.astype(np.float32), average.noise_variance, average.releases)

    def profile_acknowledged(self) -> None:
        """The server has the profile; it is not sent again until the data changes."""
        stored = self._load_average()
        if stored is not None:
            write_atomically(self._state.directory / "profile-sent", stored.last_release_sha256.encode())

    def _released_profile(self, round_number: int) -> Float32Array:
        mechanism = self._terms.profile
        path = profile_path(self._ledger.directory, self._data_epoch, mechanism)
        done = self._ledger.release_of("profile", round_number, self._data_epoch, mechanism.sha256)
        if done is not None:
            return _read_released(path, self._terms.profile.dimensions, done.payload_digest)
        pending = self._ledger.pending("profile", round_number, self._data_epoch, mechanism.sha256)
        if pending is not None and path.exists():
            # The noisy bytes were stored and the process died before it could say so.
            released = _read_vector(path, self._terms.profile.dimensions)
            self._ledger.released(pending.sequence, _digest(released))
            return released
        reserved: list[int] = []

        def charge() -> None:
            event = GaussianEvent(mechanism.noise_multiplier, mechanism.sampling_rate, 1)
            reserved.append(
                self._ledger.reserve(
                    "profile",
                    round_number,
                    event if event.is_private else UNPROTECTED,
                    data_epoch=self._data_epoch,
                    secure_noise=not self.randomness.is_test,
                    mechanism={"name": "task profile", "sha256": mechanism.sha256},
                    clipping_norm=mechanism.clipping_norm,
                    dimensions=mechanism.dimensions,
                    covered_by="dp" if event.is_private else "nothing",
                    example_ids=self._evidence,
                    context=mechanism.sha256,
                )
            )

        released = self._make_profile(charge)
        write_atomically(path, _encode(released))
        self._ledger.released(reserved[0], _digest(released))
        return released

    def _average(self, released: Float32Array) -> ReleasedProfile:
        decay = self._terms.relevance.average_decay
        average = update_average(self._load_average(), released, self._terms.profile, decay)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            vector=average.vector,
            noise_variance=average.noise_variance,
            releases=average.releases,
            last=np.frombuffer(bytes.fromhex(average.last_release_sha256), dtype=np.uint8),
        )
        write_atomically(self._state.directory / "profile-average.npz", buffer.getvalue())
        return average

    def _load_average(self) -> ReleasedProfile | None:
        path = self._state.directory / "profile-average.npz"
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                average = ReleasedProfile(
                    stored["vector"],
                    float(stored["noise_variance"]),
                    int(stored["releases"]),
                    stored["last"].tobytes().hex(),
                )
            if average.vector.shape != (self._terms.profile.dimensions,) or average.releases < 1:
                raise ValueError("it is of another shape")
            return average
        except _ARRAY_ERRORS as error:
            raise StateError(f"{path} is damaged ({error}); delete it, the ledger stays valid") from None


def _encode(vector: Float32Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return buffer.getvalue()


def _digest(vector: Float32Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()


def _read_released(path: Path, dimensions: int, digest: str | None) -> Float32Array:
    vector = _read_vector(path, dimensions)
    if _digest(vector) != digest:
        # Sent unnoticed, other bytes would be a release that nobody was charged for.
        raise StateError(
            f"{path}: the stored task profile is not the one that was released: its SHA-256 is "
            f"{_digest(vector)[:12]}…, the privacy ledger has {str(digest)[:12]}…. {_LOST_PROFILE}"
        )
    return vector


def _read_vector(path: Path, dimensions: int) -> Float32Array:
    try:
        with path.open("rb") as file:
            vector: Float32Array = np.load(file, allow_pickle=False)
    except _ARRAY_ERRORS as error:
        raise StateError(
            f"{path}: the stored task profile cannot be read ({error}), and was released. {_LOST_PROFILE}"
        ) from None
    if vector.shape != (dimensions,) or vector.dtype != np.float32:
        raise StateError(f"{path}: a profile of shape {vector.shape}, expected ({dimensions},) float32")
    return vector
