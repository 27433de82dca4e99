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
from fedmosaic.client.protection import Identity, Protection
from fedmosaic.experiments.scenario.founding import fit_profile, found_federation
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.encryption.mask.aggregation import WordProduct
from fedmosaic.privacy.federation.kits import Kit, open_kit
from fedmosaic.protos.messages import PROTOCOL_VERSION, Enrolled, Enrolment, Profile
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.round.relevance import corrected_cosine
from fedmosaic.server.settings import settings_from_kit

_NO_DEADLINE_SECONDS = 1e8
_SUMS = 64
"""Distinct rows of weights, as many as clients are drawn for a round or groups share one."""


def run_server(scenario: Scenario, directory: Path, console: Console) -> float:
    """Found a federation in an empty directory and run its rounds with random uploads.

    Returns the mean processor seconds of closing one: other work on the machine must not look like growth.
    """
    mechanism = fit_profile(scenario, directory, console, own_process=False)
    found_federation(scenario, mechanism, directory, 7443)
    place = directory / "federation"
    settings = settings_from_kit(place / "server").model_copy(
        update={
            "durable": False,
            "round_deadline_seconds": _NO_DEADLINE_SECONDS,
            "gathering_seconds": _NO_DEADLINE_SECONDS,
        }
    )
    random = np.random.default_rng(0)
    coordinator, roster = Coordinator(settings), open_kit(place / "server").roster
    closing: list[float] = []
    try:
        coordinator.advance()
        for number in range(1, scenario.schedule.rounds + 1):
            for name in sorted(coordinator.taking_part(number)):
                enrolled, protection = _enrol(coordinator, Kit(place / "clients" / name, roster))
                aggregate = coordinator.pull(name, number)
                epoch = aggregate.upload_key_epoch if aggregate is not None else 0
                vector = random.normal(0, 0.01, scenario.adapter.shared_dimensions).astype(np.float32)
                # Well above its noise, so that the server takes it for signal and weighs by it.
                drawn = random.normal(0, 3 * mechanism.noise_standard_deviation, mechanism.dimensions)
                profile = Profile(drawn.astype(np.float32), mechanism.noise_variance, 1)
                upload = protection.seal(enrolled.run_id, number, epoch, {"shared": vector}, profile)
                coordinator.push(name, upload)
            before = time.process_time()
            coordinator.advance()
            closing.append(time.process_time() - before)
    finally:
        coordinator.close()
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


def _enrol(coordinator: Coordinator, kit: Kit) -> tuple[Enrolled, Protection]:
    name = kit.directory.name
    enrolled = coordinator.enrol(
        name,
        Enrolment(
            protocol_version=PROTOCOL_VERSION,
            federation=kit.roster.federation,
            roster_hash=kit.roster.hash,
            adapter_spec_hash=kit.roster.terms.adapter.spec_hash,
            family="",
            software=f"fedmosaic {__version__}",
        ),
    )
    return enrolled, Protection(Identity.of(kit), kit.roster, "", None)
