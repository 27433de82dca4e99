"""The server's side of `python -m benchmarks.scale`: real rounds of random adapters, without any model.

Founding, signatures, admission, relevance, weights and sums are those of a federation; only what clients
would train and probe is drawn at random. It shows how the server's work grows, in seconds per round.
"""

import time
from pathlib import Path

import numpy as np
from rich.console import Console

from fedmosaic import __version__
from fedmosaic.client.protection import Identity, Protection
from fedmosaic.experiments.scenario.founding import fit_profile, found_federation
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.protos.messages import PROTOCOL_VERSION, Enrolled, Enrolment, Profile
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.settings import settings_from_kit

_NO_DEADLINE_SECONDS = 1e8


def run_server(scenario: Scenario, directory: Path, console: Console) -> tuple[float, list[float]]:
    """Found a federation in an empty directory and run its rounds with random uploads.

    Returns seconds of everything but the founding, and by round the processor seconds of closing it.
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
    coordinator = Coordinator(settings)
    started = time.monotonic()
    closing: list[float] = []
    try:
        clients = {c.id: _enrol(coordinator, place / "clients" / c.id) for c in scenario.clients}
        coordinator.advance()
        for number in range(1, scenario.schedule.rounds + 1):
            for name, (enrolled, protection) in clients.items():
                aggregate = coordinator.pull(name, number)
                epoch = aggregate.upload_key_epoch if aggregate is not None else 0
                vector = random.normal(0, 0.01, scenario.adapter.shared_dimensions).astype(np.float32)
                # Well above its noise, so that the server takes it for signal and weighs by it.
                drawn = random.normal(0, 3 * mechanism.noise_standard_deviation, mechanism.dimensions)
                profile = Profile(drawn.astype(np.float32), mechanism.noise_variance, 1)
                upload = protection.seal(enrolled.run_id, number, epoch, {"shared": vector}, profile)
                coordinator.push(name, upload)
            # The processor's time: other work on the machine must not look like growth.
            before = time.process_time()
            coordinator.advance()
            closing.append(time.process_time() - before)
    finally:
        coordinator.close()
    return time.monotonic() - started, closing


def _enrol(coordinator: Coordinator, kit_directory: Path) -> tuple[Enrolled, Protection]:
    kit = open_kit(kit_directory)
    name = kit_directory.name
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
