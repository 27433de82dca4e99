"""One model in memory for all clients of an architecture: their adapters take turns on it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.model.examples import padding_token, read_examples
from fedmosaic.client.vision.inputs import VisionInputs, open_images
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient
from fedmosaic.protos.errors import StateError

COMPUTE = threading.RLock()
"""Held while anything is computed with a model: the clients of one process take turns, also across
architectures, because PyTorch's generator of random numbers is one for the process."""


@dataclass(eq=False)
class AdapterState:
    """A client's adapter by parameter name while another is in the model; empty before the first turn."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class SharedModel:
    """A model with one adapter, lent to one client at a time.

    Only the adapter's parameters belong to a client; its buffers and the library's switches are the same for
    all.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id = padding_token(tokenizer)
        self._adapter = {
            name: parameter
            for name, parameter in model.named_parameters()
            if any(part.startswith(("colora_", "lora_")) for part in name.split("."))
        }
        self._fresh = self._read()
        self._current: AdapterState | None = None

    @contextmanager
    def with_adapter(self, state: AdapterState) -> Iterator[PeftModel]:
        """The model with this client's adapter; everybody else waits. May be nested by one thread."""
        with COMPUTE:
            if self._current is not state:
                if self._current is not None:
                    self._current.tensors = self._read()
                self._write(state.tensors or self._fresh)
                self._current = state
            yield self.model

    def read(self, state: AdapterState) -> dict[str, torch.Tensor]:
        """A copy of a client's adapter."""
        with self.with_adapter(state):
            return self._read()

    def write(self, state: AdapterState, tensors: dict[str, torch.Tensor]) -> None:
        """Replace a client's adapter; `StateError` if a tensor is missing, unknown, or of another shape."""
        expected = {name: parameter.shape for name, parameter in self._adapter.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise StateError("the saved adapter is of another shape than this model's; start the run over")
        with self.with_adapter(state):
            self._write(tensors)

    def _read(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._adapter.items()}

    @torch.no_grad()
    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._adapter.items():
            parameter.copy_(tensors[name])
            parameter.grad = None


def shared_model(
    scenario: Scenario, client: ScenarioClient, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> SharedModel:
    """A model that can read the images of all the scenario's examples; see `open_images` for the errors."""
    inputs = VisionInputs(client.model.path, scenario.images, client.projector, scenario.question_only)
    tasks = [task for entry in scenario.clients for task in entry.task_list]
    files = dict.fromkeys(file for task in tasks for file in (task.train, task.test))
    examples = [example for file in files for example in read_examples(file)]
    return SharedModel(model, open_images(inputs, model, tokenizer, examples, scenario.training.max_length))
