"""One model in memory for all clients of an architecture: their adapters take turns on it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedmosaic.protos.errors import StateError

COMPUTE = threading.RLock()
"""Held while anything is computed with a model: the clients of one process take turns, also across
architectures, because PyTorch's generator of random numbers is one for the process."""


@dataclass(eq=False)
class Tenant:
    """A client's adapter while another one is in the model.

    Attributes:
        tensors: by parameter name; empty before the first turn, which starts from the fresh adapter.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class ModelHost:
    """A model with one adapter, lent to one client at a time.

    Only the adapter's parameters belong to a client. What the adapter holds as buffers (the frozen bases)
    and what the library keeps as switches (which branches are active) is the same for all of them.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._adapter = {
            name: parameter
            for name, parameter in model.named_parameters()
            if any(part.startswith(("colora_", "lora_")) for part in name.split("."))
        }
        self._fresh = self._read()
        self._occupant: Tenant | None = None

    @contextmanager
    def lent_to(self, tenant: Tenant) -> Iterator[PeftModel]:
        """The model with this client's adapter; everybody else waits. May be nested by one thread."""
        with COMPUTE:
            if self._occupant is not tenant:
                if self._occupant is not None:
                    self._occupant.tensors = self._read()
                self._write(tenant.tensors or self._fresh)
                self._occupant = tenant
            yield self.model

    def read(self, tenant: Tenant) -> dict[str, torch.Tensor]:
        """A copy of a client's adapter."""
        with self.lent_to(tenant):
            return self._read()

    def write(self, tenant: Tenant, tensors: dict[str, torch.Tensor]) -> None:
        """Replace a client's adapter.

        Raises:
            StateError: a tensor is missing, unknown, or of another shape.
        """
        expected = {name: parameter.shape for name, parameter in self._adapter.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise StateError("the saved adapter is of another shape than this model's; start the run over")
        with self.lent_to(tenant):
            self._write(tensors)

    def _read(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._adapter.items()}

    @torch.no_grad()
    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._adapter.items():
            parameter.copy_(tensors[name])
            parameter.grad = None
