"""A scenario on a Ray cluster, or on the cores of this machine: `fedmosaic run SCENARIO --engine ray`.

The server is an actor where the run was started; clients are sorted by architecture to actors with one base
model each. All machines share the run's directory. An actor that dies is started anew, and its turns are
taken again.
"""

import importlib
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from rich.console import Console

from fedmosaic.experiments.scenario.participants import Evaluation
from fedmosaic.experiments.scenario.terms import RunFailedError, Scenario
from fedmosaic.experiments.simulation import simulate
from fedmosaic.experiments.simulation.progress import RunProgress
from fedmosaic.experiments.simulation.worker import Architecture, Worker, architecture
from fedmosaic.privacy.federation.kits import open_kit
from fedmosaic.privacy.terminal import ending_children
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.protos.refusal import Refusal
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.run import Topic
from fedmosaic.server.settings import ServerSettings

_LASTING: Final = {"max_restarts": 20, "max_task_retries": -1}
"""Options of an actor that Ray starts anew, so often, and whose turns are taken again."""
_TICK_SECONDS: Final = 1.0
_QUIET: Final = Console(quiet=True)


@dataclass(frozen=True)
class Cluster:
    """Where the actors are: the address of a running cluster, None to start one on this machine.

    `actors` hold clients, 0 for one per core or as many as the GPUs have room for; `actors_per_gpu` share a
    GPU.
    """

    address: str | None = None
    actors: int = 0
    actors_per_gpu: int = 0


@ending_children()
def simulate_on(
    cluster: Cluster,
    scenario: Scenario,
    directory: Path,
    console: Console,
    reference: Mapping[str, float] | None = None,
) -> None:
    """Run a scenario on a cluster, as `simulate` does here; `ConfigurationError` without Ray or room."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigurationError(
            "--engine ray needs Ray, which is not installed; install fedmosaic[ray]"
        ) from None
    begun = not ray.is_initialized()
    if begun:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    try:
        _simulate(ray, cluster, scenario, directory, console, reference or {})
    finally:
        if begun:
            ray.shutdown()


def _simulate(
    ray: Any,
    cluster: Cluster,
    scenario: Scenario,
    directory: Path,
    console: Console,
    reference: Mapping[str, float],
) -> None:
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    # In a process of its own, whose memory of all models is given back.
    ready = ray.remote(_prepared).options(name="prepare", scheduling_strategy=here, max_retries=0)
    try:
        scenario, settings, flops = ray.get(ready.remote(scenario, directory, reference))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    placed = {"name": f"server of {directory.name}", "scheduling_strategy": here}
    server = (
        ray.remote(_Server).options(num_cpus=0, max_concurrency=32, **placed, **_LASTING).remote(settings)
    )
    coordinator = cast(Coordinator, RemoteCoordinator(ray, server))
    progress = simulate.run_progress(scenario, directory, console)
    with progress.bar:
        actors = _Actors(ray, cluster, scenario, directory, server, flops, progress)
        console.print(f"{actors.count} actors on {len(ray.nodes())} nodes")
        simulate.play(scenario, directory, coordinator, actors.turns)
    coordinator.close()


def _prepared(
    scenario: Scenario, directory: Path, reference: Mapping[str, float]
) -> tuple[Scenario, ServerSettings, dict[str, float]]:
    scenario, settings, flops, _ = simulate.prepare(scenario, directory, reference, _QUIET)
    return scenario, settings, flops


class _Server:
    """The coordinator in an actor of its own; its state is on disk, for the next one if this one dies."""

    def __init__(self, settings: ServerSettings) -> None:
        self._coordinator = Coordinator(settings, simulate.standing_clock)

    def call(self, name: str, arguments: Sequence[Any]) -> tuple[Any, tuple[Any, ...] | None]:
        """What a method or property gives, and what a refusal is made of."""
        try:
            found = getattr(self._coordinator, name)
            return (found(*arguments) if callable(found) else found), None
        except Refusal as refusal:
            return None, (refusal.kind, refusal.reason, refusal.message, refusal.remedy)


class RemoteCoordinator:
    """What stands for the coordinator in another process; nobody is told of changes, so clients look."""

    def __init__(self, ray: Any, server: Any) -> None:
        self._ray, self._server = ray, server

    def subscribe(self, listener: Callable[[Topic], None]) -> None:
        """See `Coordinator.subscribe`; nothing is heard."""

    def unsubscribe(self, listener: Callable[[Topic], None]) -> None:
        """See `Coordinator.unsubscribe`."""

    @property
    def available_round(self) -> int:
        """See `Coordinator.available_round`."""
        return int(self._call("available_round"))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            found, refused = self._ray.get(self._server.call.remote(name, arguments))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        if refused is not None:
            raise Refusal(*refused)
        return found


class _ClientActor:
    """A process with the model of one architecture, which takes the turns of its clients."""

    def __init__(
        self, scenario: Scenario, directory: Path, server: Any, flops: Mapping[str, float], first: int
    ) -> None:
        """Load the model of the client at place `first` in the scenario."""
        entry = scenario.clients[first]
        terms = open_kit(directory / "federation" / "clients" / entry.id).roster.terms
        models = {architecture(entry): simulate.load_shared(scenario, entry, terms.adapter)}
        coordinator = cast(Coordinator, RemoteCoordinator(importlib.import_module("ray"), server))
        progress = RunProgress(_QUIET, 1)
        self._worker = Worker(
            scenario, directory, models, Evaluation(scenario), coordinator, progress, flops, _TICK_SECONDS
        )

    def turn(self, index: int, number: int) -> None:
        """See `Worker.turn`."""
        try:
            self._worker.turn(index, number)
        except Exception as error:
            name = self._worker.scenario.clients[index].id
            # Only the words: not every error can be carried to another process.
            raise RunFailedError(f"client {name}: {error}") from None


class _Actors:
    """Turns on actors, few at once on each; a client's are always on the same one."""

    def __init__(
        self,
        ray: Any,
        cluster: Cluster,
        scenario: Scenario,
        directory: Path,
        server: Any,
        flops: Mapping[str, float],
        progress: RunProgress,
    ) -> None:
        self._ray, self._scenario, self._progress = ray, scenario, progress
        alike: dict[Architecture, list[int]] = defaultdict(list)
        for index, entry in enumerate(scenario.clients):
            alike[architecture(entry)].append(index)
        counts = _shares(_size(ray, cluster, len(alike)), [len(indices) for indices in alike.values()])
        self.count = sum(counts)
        self._limit = simulate.turns_at_once(scenario, len(scenario.clients))
        gpus = {"num_gpus": 1 / cluster.actors_per_gpu} if cluster.actors_per_gpu else {}
        options = {"max_concurrency": self._limit, **gpus, **_LASTING}
        # Held for as long as the actors: one that is started anew is given it again.
        self._whole, made = ray.put(scenario), ray.remote(_ClientActor)
        self._actor_of: dict[int, int] = {}
        self._actors: list[Any] = []
        for count, indices in zip(counts, alike.values(), strict=True):
            for number in range(count):
                self._actor_of |= dict.fromkeys(indices[number::count], len(self._actors))
                name = f"clients {len(self._actors)} of {directory.name}"
                place = self._on_node(len(self._actors), "GPU" if gpus else "CPU")
                actor = made.options(name=name, scheduling_strategy=place, **options)
                self._actors.append(actor.remote(self._whole, directory, server, flops, indices[0]))

    def _on_node(self, number: int, resource: str) -> Any:
        """On the nodes in turn, as long as they are there."""
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get(resource)]
        strategies = self._ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(nodes[number % len(nodes)]["NodeID"], soft=True)

    def turns(self, indices: Sequence[int], number: int) -> None:
        """See `fedmosaic.experiments.simulation.simulate.Turns`."""
        ray, left = self._ray, defaultdict[int, deque[int]](deque)
        for index in indices:
            left[self._actor_of[index]].append(index)
        running: dict[Any, int] = {}

        def begin(actor: int) -> None:
            if left[actor]:
                index = left[actor].popleft()
                named = self._actors[actor].turn.options(name=self._scenario.clients[index].id)
                running[named.remote(index, number)] = index

        for actor in range(len(self._actors)):
            for _ in range(self._limit):
                begin(actor)
        while running:
            (done,), _ = ray.wait(list(running))
            index = running.pop(done)
            name = self._scenario.clients[index].id
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise RunFailedError(f"client {name}: its actor is lost ({error})") from error
            if number <= self._scenario.schedule.rounds:
                self._progress.add(simulate.steps_of_turn(self._scenario), name, number)
            begin(self._actor_of[index])


def _size(ray: Any, cluster: Cluster, architectures: int) -> int:
    """How many actors the cluster is to have; `ConfigurationError` if it has no room for as many."""
    resources = ray.cluster_resources()
    room = int(resources.get("GPU", 0)) * cluster.actors_per_gpu
    if cluster.actors_per_gpu and not room:
        raise ConfigurationError("--actors-per-gpu, and the cluster has no GPU; leave it out")
    size = cluster.actors or room or max(architectures, int(resources.get("CPU", 1)))
    if size < architectures or 0 < room < size:
        raise ConfigurationError(
            f"{size} actors for {architectures} architectures, one base model each"
            f"{f', on GPUs with room for {room}' if room else ''}; give as many --actors as fit"
        )
    return size


def _shares(size: int, counts: Sequence[int]) -> list[int]:
    """Actors of each architecture, at least one and no more than it has clients, in proportion to these."""
    shares = [1] * len(counts)
    for _ in range(size - len(counts)):
        needy = max(range(len(counts)), key=lambda i: counts[i] / shares[i])
        if counts[needy] <= shares[needy]:
            break
        shares[needy] += 1
    return shares
