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
    """Where the actors are: the address of a running cluster, None to start one on this machine for the run.

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
    """Run a scenario on a cluster, as `simulate` does here.

    `ConfigurationError` without Ray, the cluster or room; `RunFailedError` if a client failed, or a process
    died too often.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigurationError(
            "--engine ray needs Ray, which is not installed; install fedmosaic[ray]"
        ) from None
    begun = not ray.is_initialized()
    if begun:
        _connect(ray, cluster.address, console)
    try:
        _simulate(ray, cluster, scenario, directory, console, reference or {})
    except ray.exceptions.RayError as error:
        raise RunFailedError(
            f"Ray lost a process of the run ({_in_a_line(error)}); go on with: "
            f"fedmosaic run {directory} --engine ray"
        ) from error
    finally:
        if begun:
            ray.shutdown()


def _connect(ray: Any, address: str | None, console: Console) -> None:
    try:
        # Without an address Ray would join whatever cluster was last started here.
        context = ray.init(address=address or "local", log_to_driver=False, logging_level="warning")
    except Exception as error:  # Ray raises plain ones too, as where a node is slow to start
        raise ConfigurationError(
            f"--address {address}: no Ray cluster could be joined ({_in_a_line(error)}); compare with "
            "`ray status`, and set RAY_AUTH_MODE=token if the cluster was started with it"
            if address
            else f"Ray cannot be started on this machine ({_in_a_line(error)})"
        ) from error
    if context.dashboard_url:
        console.print(f"Ray's dashboard: http://{context.dashboard_url}")


def _in_a_line(error: BaseException) -> str:
    """What happened and, of Ray's many lines about it, which process it was and where."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return ", ".join([first, *(line.strip() for line in more if line.startswith(("\tname: ", "\tip: ")))])


def _result(ray: Any, reference: Any) -> Any:
    """What a call gave, or what it raised, as itself; Ray's errors for a lost process are raised too."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


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
    # A head that is to do no work itself has no CPU to give.
    placed = {"num_cpus": 0, "scheduling_strategy": here}
    # In a process of its own, whose memory of all models is given back.
    ready = ray.remote(_prepared).options(name="prepare", max_retries=0, **placed)
    scenario, settings, flops = _result(ray, ready.remote(scenario, directory, reference))
    # So pickled, they are kept until this process ends. An actor's large arguments and handles need not be,
    # and without them it cannot be started anew.
    parts = ray.cloudpickle.dumps(ray.put((scenario, settings, flops)))
    options = {"name": _server_name(directory), "max_concurrency": 32, **placed, **_LASTING}
    server = ray.remote(_Server).options(**options).remote(parts)
    coordinator = cast(Coordinator, RemoteCoordinator(ray, server))
    actors = _Actors(ray, cluster, scenario, directory, parts)
    nodes = sum(node["Alive"] for node in ray.nodes())
    console.print(f"{actors.count} actors on {nodes} nodes load their models")
    actors.wait_until_loaded()
    progress = simulate.run_progress(scenario, directory, console)
    with progress.bar:
        simulate.play(scenario, directory, coordinator, partial(actors.turns, progress))
    coordinator.close()


def _prepared(
    scenario: Scenario, directory: Path, reference: Mapping[str, float]
) -> tuple[Scenario, ServerSettings, dict[str, float]]:
    scenario, settings, flops, _ = simulate.prepare(scenario, directory, reference, _QUIET)
    return scenario, settings, flops


def _server_name(directory: Path) -> str:
    return f"server of {directory.name}"


class _Server:
    """The coordinator in an actor of its own; its state is on disk, for the next one if this one dies."""

    def __init__(self, parts: bytes) -> None:
        ray = importlib.import_module("ray")
        _, settings, _ = ray.get(ray.cloudpickle.loads(parts))  # from our own process that starts the run
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
        call = self._server.call.options(name=f"server: {name}")
        found, refused = _result(self._ray, call.remote(name, arguments))
        if refused is not None:
            raise Refusal(*refused)
        return found


class _ClientActor:
    """A process with the model of one architecture, which takes the turns of its clients."""

    def __init__(self, parts: bytes, directory: Path, first: int) -> None:
        """Load the model of the client at place `first` in the scenario."""
        ray = importlib.import_module("ray")
        scenario, _, flops = ray.get(ray.cloudpickle.loads(parts))  # from our own process, too
        self._worker: Any = None  # a Worker, once the model is loaded
        try:
            entry = scenario.clients[first]
            terms = open_kit(directory / "federation" / "clients" / entry.id).roster.terms
            models = {architecture(entry): simulate.load_shared(scenario, entry, terms.adapter)}
            coordinator = cast(Coordinator, RemoteCoordinator(ray, ray.get_actor(_server_name(directory))))
            said = RunProgress(_QUIET, 1), flops, _TICK_SECONDS
            self._worker = Worker(scenario, directory, models, Evaluation(scenario), coordinator, *said)
        except Exception as error:
            # Told in words when it is asked: of an actor that is not made Ray would show the trace.
            self._problem = f"{ray.util.get_node_ip_address()}: {error}"

    def check_loaded(self) -> None:
        """`RunFailedError` if the model could not be loaded."""
        if self._worker is None:
            raise RunFailedError(self._problem)

    def turn(self, index: int, number: int) -> None:
        """See `Worker.turn`."""
        self.check_loaded()
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
        parts: bytes,
    ) -> None:
        self._ray, self._scenario, self._directory = ray, scenario, directory
        alike: dict[Architecture, list[int]] = defaultdict(list)
        for index, entry in enumerate(scenario.clients):
            alike[architecture(entry)].append(index)
        counts = _shares(_size(ray, cluster, len(alike)), [len(indices) for indices in alike.values()])
        self.count = sum(counts)
        self._limit = simulate.turns_at_once(scenario, len(scenario.clients))
        gpus = {"num_gpus": 1 / cluster.actors_per_gpu} if cluster.actors_per_gpu else {}
        options = {"max_concurrency": self._limit, **gpus, **_LASTING}
        made = ray.remote(_ClientActor)
        self._actor_of: dict[int, int] = {}
        self._actors: list[Any] = []
        for count, indices in zip(counts, alike.values(), strict=True):
            for number in range(count):
                self._actor_of |= dict.fromkeys(indices[number::count], len(self._actors))
                name = f"clients {len(self._actors)} of {directory.name}"
                place = self._on_node(len(self._actors), "GPU" if gpus else "CPU")
                actor = made.options(name=name, scheduling_strategy=place, **options)
                self._actors.append(actor.remote(parts, directory, indices[0]))

    def _on_node(self, number: int, resource: str) -> Any:
        """On the nodes in turn, as long as they are there."""
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get(resource)]
        strategies = self._ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(nodes[number % len(nodes)]["NodeID"], soft=True)

    def wait_until_loaded(self) -> None:
        """Return when every actor has its model; `RunFailedError` if one has not."""
        for asked in [actor.check_loaded.options(name="load").remote() for actor in self._actors]:
            _result(self._ray, asked)

    def _trained_until(self, index: int) -> int:
        name = self._scenario.clients[index].id
        return simulate.trained_until(self._scenario, self._directory, name)

    def turns(self, progress: RunProgress, indices: Sequence[int], number: int) -> None:
        """See `fedmosaic.experiments.simulation.simulate.Turns`."""
        ray, left = self._ray, defaultdict[int, deque[int]](deque)
        for index in indices:
            left[self._actor_of[index]].append(index)
        running: dict[Any, int] = {}
        before: dict[int, int] = {}

        def begin(actor: int) -> None:
            if left[actor]:
                index = left[actor].popleft()
                before[index] = self._trained_until(index)
                named = self._actors[actor].turn.options(name=self._scenario.clients[index].id)
                running[named.remote(index, number)] = index

        for actor in range(len(self._actors)):
            for _ in range(self._limit):
                begin(actor)
        while running:
            (done,), _ = ray.wait(list(running))
            index = running.pop(done)
            name = self._scenario.clients[index].id
            _result(ray, done)
            # None, if an earlier process was lost only after the turn.
            if self._trained_until(index) > before.pop(index):
                progress.add(simulate.steps_of_turn(self._scenario), name, number)
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
