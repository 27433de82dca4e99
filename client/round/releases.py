"""The releases of a client, charged to the ledger before they exist.

`Releases._release` is the one order of both channels: finish the private sum, charge (durably, or be
refused), draw noise, store the noisy bytes, mark them released; then they are sent. A crash in between wastes
budget and never forgets any; bytes that are stored are sent again as they are, free of charge.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fedmosaic.client.ledger import ServerAnchor
from fedmosaic.client.planning import AdapterPlan
from fedmosaic.client.round import records
from fedmosaic.client.round.records import digest_of
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.files import hold_directory, write_atomically
from fedmosaic.privacy.ledger.ledger import Ledger
from fedmosaic.privacy.ledger.rows import Channel, Coverage, data_epoch
from fedmosaic.privacy.mechanism.gaussian import ClippedSum
from fedmosaic.privacy.mechanism.noise import SecureNoise, SeededTestNoise
from fedmosaic.privacy.mechanism.profile import Float32Array, release, update_average
from fedmosaic.protos.errors import BudgetExceededError, PrivacyError
from fedmosaic.protos.messages import Profile

log = logging.getLogger(__name__)
S = TypeVar("S")
R = TypeVar("R")
Randomness = SecureNoise | SeededTestNoise
ProfileSum = Callable[[], ClippedSum]
"""Probes the examples of a data epoch and sums their clipped gradients: private, before noise."""


class Releases:
    """What one client has released and may still release.

    `receive_only` is whether the budget has refused the adapter; nothing of it leaves then. `clipping` counts
    clipped examples, `randomness` gives noise and Poisson samples, `anchor` is what the server keeps of the
    ledger.
    """

    def __init__(
        self,
        ledger: Ledger,
        terms: Terms,
        state: ClientState,
        example_ids: tuple[str, ...],
        profile_sum: ProfileSum,
        randomness: Randomness,
        adapter_plan: AdapterPlan,
        *,
        disjoint_epochs: bool = False,
    ) -> None:
        """Begin, or go on with what the ledger and the state directory hold.

        `disjoint_epochs` composes this data epoch in parallel with others that share no example with it,
        which the ledger proves or refuses. Right only where the epoch of an example does not depend on other
        examples, as with examples that arrive over time. StateError if the record of clipping is damaged.
        """
        self.receive_only = False
        self.clipping = records.ClippingRecord(state.directory / records.CLIPPING)
        self.clipping.shares()  # found to be damaged after a charge, it would cost one at every start
        self.randomness = randomness
        self.anchor = ServerAnchor(ledger, state.record)
        self._ledger = ledger
        self._terms = terms
        self._state = state
        self._examples = len(example_ids)
        self._data_epoch = data_epoch(example_ids)
        self._evidence = example_ids if disjoint_epochs else None
        self._profile_sum = profile_sum
        self._plan = adapter_plan
        self._sent = state.directory / "profile-sent"
        self._average = state.directory / "profile-average.npz"

    @property
    def adapter_plan(self) -> AdapterPlan:
        """The plan for DP-SGD; PrivacyError if the adapter is not trained privately."""
        if not self._plan.noise_multiplier > 0.0:
            raise PrivacyError("this run does not train the adapter with differential privacy")
        return self._plan

    def _release(
        self,
        channel: Channel,
        round_number: int,
        event: GaussianEvent,
        total: Callable[[], S],
        noise: Callable[[S], R],
        store: Callable[[R], str] | None,
        **about: Any,
    ) -> R:
        """Sum, charge, noise, store: the order of every release under differential privacy.

        `event` is all noise that `noise` will draw. `total` finishes or checks the private sum: all that may
        fail at no cost. `store` makes the release durable and gives its SHA-256, None where `adapter` books
        it later. BudgetExceededError if the budget refuses; no noise was drawn then.
        """
        summed = total()
        sequence = self._reserve(
            channel,
            round_number,
            event,
            secure_noise=not self.randomness.is_test,
            example_ids=self._evidence,
            **about,
        )
        released = noise(summed)
        if store is not None:
            self._ledger.released(sequence, store(released))
        return released

    def release_adapter(
        self,
        round_number: int,
        event: GaussianEvent,
        total: Callable[[], S],
        noise: Callable[[S], R],
        store: Callable[[R], str] | None = None,
    ) -> R | None:
        """A round's release of the shared branch, by `_release`; None in receive-only mode, new or not.

        What DP-SGD trains is stored with the rest of the adapter, and booked by `adapter`.
        """
        if self.receive_only:
            return None
        terms, privacy = self._terms, self._terms.adapter_privacy
        # Where it goes is told by nothing else in the ledger, which later runs have to speak for.
        mechanism = {
            "name": "DP-SGD on P and Q",
            "expected_batch_size": privacy.expected_batch_size,
            "protection": terms.adapter.protection,
        }
        if terms.adapter.in_group_sums:
            sums = terms.group_sums
            mechanism |= {"minimum_contributors": sums.minimum_contributors, "colluders": sums.colluders}
        about = {"clipping_norm": privacy.clipping_norm, "dimensions": terms.adapter.shared_dimensions}
        try:
            return self._release(
                "adapter", round_number, event, total, noise, store, mechanism=mechanism, **about
            )
        except BudgetExceededError as error:
            self.receive_only = True
            log.warning("round %d: %s; going on in receive-only mode", round_number, error)
            return None

    def adapter_begun(self, round_number: int) -> bool:
        """Whether this round's release was charged, or refused, before: no other follows it."""
        ledger, key = self._ledger, self._key("adapter", round_number)
        return bool(ledger.release_of(*key) or ledger.pending(*key) or ledger.refused(*key))

    def _key(self, channel: Channel, round_number: int) -> tuple[Channel, int, str, str]:
        """What the ledger knows a release by.

        The rounds of a run are not those of another; a profile is of its map, whatever the run.
        """
        context = self._terms.profile.sha256 if channel == "profile" else self._state.record.run_id
        return channel, round_number, self._data_epoch, context

    def _reserve(self, channel: Channel, round_number: int, event: GaussianEvent, **about: Any) -> int:
        """Charge a release under its key; see `Ledger.reserve`."""
        *_, epoch, context = self._key(channel, round_number)
        return self._ledger.reserve(channel, round_number, event, data_epoch=epoch, context=context, **about)

    def adapter(self, round_number: int, vectors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Book the adapter sections that are about to leave, by name, and return what may leave.

        That is nothing in receive-only mode, or where an earlier process was refused this round's training
        and ended before it sent.
        """
        private = self._terms.adapter.private
        if self.receive_only or (private and self._ledger.refused(*self._key("adapter", round_number))):
            return {}
        for name, vector in vectors.items():
            self._book("family" if name == "family" else "adapter", round_number, digest_of(vector))
        return vectors

    def _book(self, channel: Channel, round_number: int, digest: str) -> None:
        ledger, key = self._ledger, self._key(channel, round_number)
        done = ledger.release_of(*key)
        if done is not None:
            if done.reference is not None:
                ledger.resent(done.reference, digest, round_number)
            return
        pending = ledger.pending(*key)
        if pending is not None:
            ledger.released(pending.sequence, digest)
            return
        if self._terms.adapter.private:
            raise PrivacyError(
                f"round {round_number}: the adapter was not charged to the ledger, so it may not leave"
            )
        coverage: Coverage = "cryptography" if self._terms.adapter.encrypted else "nothing"
        sequence = self._reserve(channel, round_number, UNPROTECTED, secure_noise=True, covered_by=coverage)
        ledger.released(sequence, digest)

    def profile(self, round_number: int) -> Profile | None:
        """The task profile to send, or None to let the server go on with the last one.

        Released once per data epoch and mechanism; while both are unchanged, later rounds and later runs
        re-use it.
        """
        mechanism = self._terms.profile
        if self._examples < mechanism.minimum_examples:
            words = "fewer than %d examples: no task profile is released, the server uses uniform weights"
            log.warning(words, mechanism.minimum_examples)
            return None
        try:
            # Another run on the same data may be about to release the same profile, which is charged once.
            with hold_directory(self._ledger.directory / "profile.lock", "", wait=True):
                released = self._released_profile(round_number)
        except BudgetExceededError as error:
            log.warning("%s; going on without a task profile", error)
            return None
        before = records.read_average(self._average, mechanism.dimensions)
        average = update_average(before, released, mechanism, self._terms.relevance.average_decay)
        records.write_average(self._average, average)
        # Whatever else the file holds, the profile is sent once more, which costs nothing.
        if self._sent.exists() and self._sent.read_bytes() == average.last_release_sha256.encode():
            return None
        return Profile(average.vector.astype(np.float32), average.noise_variance, average.releases)

    def _released_profile(self, round_number: int) -> Float32Array:
        """What was stored before, or a release."""
        mechanism, ledger, key = self._terms.profile, self._ledger, self._key("profile", round_number)
        path = records.profile_path(ledger.directory, self._data_epoch, mechanism)
        done = ledger.release_of(*key)
        if done is not None:
            return records.read_profile(path, mechanism.dimensions, done.payload_digest or "")
        pending = ledger.pending(*key)
        if pending is not None and path.exists():
            # The noisy bytes were stored and the process died before it could say so.
            released = records.read_profile(path, mechanism.dimensions)
            ledger.released(pending.sequence, digest_of(released))
            return released

        def noise(total: ClippedSum) -> Float32Array:
            self.clipping.add("profile", total.clipped, total.rows)
            return release(total, mechanism, self.randomness)

        event = GaussianEvent(mechanism.noise_multiplier, mechanism.sampling_rate, 1)
        return self._release(
            "profile",
            round_number,
            event if event.is_private else UNPROTECTED,
            self._profile_sum,
            noise,
            partial(records.write_profile, path),
            mechanism={"name": "task profile", "sha256": mechanism.sha256},
            clipping_norm=mechanism.clipping_norm,
            dimensions=mechanism.dimensions,
            covered_by="dp" if event.is_private else "nothing",
        )

    def profile_acknowledged(self) -> None:
        """The server has the profile; it is not sent again until the data changes."""
        stored = records.read_average(self._average, self._terms.profile.dimensions)
        if stored is not None:
            write_atomically(self._sent, stored.last_release_sha256.encode())

    def profile_lost(self) -> None:
        """The server has lost it again, with the upload that brought it; the next one brings it anew."""
        self._sent.unlink(missing_ok=True)
