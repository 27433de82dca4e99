"""Flower's SecAgg+ in one process: its server workflow and its client mod, over a grid that calls the mod.

`flwr` is no dependency of this project; `pip install flwr` in an environment of its own that also sees this
project's packages.
"""

import copy
import importlib
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

_TWO_THIRDS = 2.0 / 3.0
_CONFIGS = "secaggplus_configs"


def _module(name: str) -> Any:
    return importlib.import_module(f"flwr.{name}")


class _Grid:
    """Hands every message to the client mod; counts the first client's seconds and bytes."""

    def __init__(self, vector: np.ndarray, gone: Iterable[int]) -> None:
        self.seconds, self.inside, self.bytes_up = 0.0, 0.0, 0
        self._common, self._app = _module("common"), _module("client.mod.secure_aggregation.secaggplus_mod")
        self._vector, self._gone = vector, set(gone)
        self._contexts: dict[Any, Any] = {}

    def _trained(self, message: Any, _context: Any) -> Any:
        common = self._common
        fitted = common.FitRes(
            common.Status(common.Code.OK, ""), common.ndarrays_to_parameters([self._vector]), 1, {}
        )
        content = _module("compat.common.recorddict_compat").fitres_to_recorddict(fitted, keep_input=False)
        return common.Message(content, reply_to=message)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """Replies of all who are there: whoever vanishes does so before its vector."""
        del timeout
        started, replies = time.process_time(), []
        # A client takes its message apart, and those of one stage are made of one content.
        for message in map(copy.deepcopy, list(messages)):
            node = message.metadata.dst_node_id
            stage = message.content.config_records[_CONFIGS]["stage"]
            if node in self._gone and stage in ("collect_masked_vectors", "unmask"):
                continue
            context = self._contexts.setdefault(
                node, self._common.Context(1, node, {}, self._common.RecordDict(), {})
            )
            began = time.process_time()
            replies.append(self._app.secaggplus_mod(message, context, self._trained))
            if node == 1:
                self.seconds += time.process_time() - began
                for values in replies[-1].content.config_records[_CONFIGS].values():
                    found = values if isinstance(values, list) else [values]
                    self.bytes_up += sum(len(each) if isinstance(each, bytes) else 8 for each in found)
        self.inside += time.process_time() - started
        return replies


def flower_seconds(count: int, dimensions: int, vanished: int) -> tuple[float, float, int]:
    """Seconds of one client and of the server, and bytes up of a client's values without their framing."""
    common, flow = _module("common"), _module("server.workflow.secure_aggregation.secaggplus_workflow")
    workflow = flow.SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=_TWO_THIRDS)
    nodes = list(range(1, count + 1))
    grid = _Grid(np.zeros(dimensions, dtype=np.float32), nodes[count - vanished :])
    nothing = common.Parameters([], "numpy.ndarray")
    given = [(SimpleNamespace(node_id=node), common.FitIns(nothing, {})) for node in nodes]
    strategy = SimpleNamespace(configure_fit=lambda *_: given, aggregate_fit=lambda *_: (None, {}))
    records = _module("compat.common.recorddict_compat").parameters_to_arrayrecord(nothing, keep_input=True)
    kept = SimpleNamespace(
        config_records={"config": common.ConfigRecord({"current_round": 1})},
        array_records={"parameters": records},
    )
    manager = SimpleNamespace(num_available=lambda: count)
    context = SimpleNamespace(strategy=strategy, state=kept, client_manager=manager)
    # What a running ServerApp has; messages are stamped with it.
    identity = _module("supercore.task_identity").TaskIdentity
    identity.run_id = identity.task_id = identity.node_id = 1
    state, started = flow.WorkflowState(), time.process_time()
    stages = ("setup", "share_keys", "collect_masked_vectors", "unmask")
    if not all(getattr(workflow, f"{stage}_stage")(grid, context, state) for stage in stages):
        raise AssertionError("SecAgg+ formed no sum")
    return grid.seconds, time.process_time() - started - grid.inside, grid.bytes_up
