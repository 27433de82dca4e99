"""The server's side of `python -m benchmarks.scale`: real rounds of random adapters, without any model.

Founding, signatures, admission, relevance, weights and sums are those of a federation; only what clients
would train and probe is drawn at random. It shows how the server's work grows, in seconds per round.
"""

import time
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.timing import measure
from fedmosaic import __version__
from fedmosaic.client.round.protection import Identity, Protection
from fedmosaic.experiments.scenario.founding import fit_profile, found_federation
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.encryption.mask.aggregation import WordProduct
from fedmosaic.privacy.federation.kits import Kit
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.protos.messages import PROTOCOL_VERSION, Enrolment, Profile, Upload
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.round.relevance import corrected_cosine
from fedmosaic.server.settings import settings_from_kit

_SUMS = 64
"""Distinct rows of weights, as many as clients are drawn for a round or groups share one."""


def run_server(scenario: Scenario, directory: Path, console: Console) -> float:
    """Found a federation in an empty directory and run its rounds with random uploads.

    Returns the mean processor seconds of closing one: other work on the machine must not look like growth.
    """
    mechanism = fit_profile(scenario, directory, console, own_process=False)
    found_federation(scenario, mechanism, directory, 7443)
    place = directory / "federation"
    settings = settings_from_kit(place / "server").model_copy(update={"durable": False})
    random, roster = np.random.default_rng(0), settings.roster
    closing: list[float] = []
    with Coordinator(settings, lambda: 0.0) as coordinator:  # where time stands still, no deadline passes
        coordinator.advance()
        for number in range(1, scenario.schedule.rounds + 1):
            for name in sorted(coordinator.taking_part(number)):
                protection = Protection(Identity.of(Kit(place / "clients" / name, roster)), roster, "", None)
                run_id = coordinator.enrol(name, enrolment(roster)).run_id
                coordinator.pull(name, number)
                upload = random_upload(protection, roster.terms, random, run_id, number, new=True)
                coordinator.push(name, upload)
            before = time.process_time()
            coordinator.advance()
            closing.append(time.process_time() - before)
    return float(np.mean(closing))


def relevance_seconds(count: int, dimensions: int) -> tuple[float, float]:
    """Processor seconds of comparing random profiles, all with all, and of the product in it alone."""
    vectors = np.random.default_rng(0).normal(size=(count, dimensions))
    variances = np.full(count, 0.01)
    compared = measure(lambda: corrected_cosine(vectors, variances))
    return compared.least, measure(lambda: vectors @ vectors.T.copy()).least


def sums_seconds(count: int, dimensions: int) -> float:
    """Processor seconds of `_SUMS` weighted sums of so many adapters, as the back end `mask` forms them."""
    random = np.random.default_rng(0)
    words = list(random.integers(-(1 << 31), 1 << 31, (count, dimensions), dtype=np.int32))
    weights = random.multinomial(1 << 12, np.full(count, 1 / count), _SUMS)
    product, sums = WordProduct(), list(np.empty((_SUMS, dimensions), dtype=np.uint32))
    return measure(lambda: product(weights, words, sums)).least


def enrolment(roster: Roster) -> Enrolment:
    """What a member without a family says at first."""
    return Enrolment(
        protocol_version=PROTOCOL_VERSION,
        federation=roster.federation,
        roster_hash=roster.hash,
        adapter_spec_hash=roster.terms.adapter.spec_hash,
        family="",
        software=f"fedmosaic {__version__}",
    )


def random_upload(
    protection: Protection, terms: Terms, random: np.random.Generator, run_id: str, number: int, *, new: bool
) -> Upload:
    """An upload of random numbers in the clear for a round, with a new profile or without one."""
    vector = random.normal(0, 0.01, terms.adapter.shared_dimensions).astype(np.float32)
    profile = None
    if new:
        mechanism = terms.profile
        # Well above its noise, so that the server takes it for signal and weighs by it.
        drawn = random.normal(0, 3 * mechanism.noise_standard_deviation, mechanism.dimensions)
        profile = Profile(drawn.astype(np.float32), mechanism.noise_variance, 1)
    return protection.seal(run_id, number, 0, {"shared": vector}, profile)
