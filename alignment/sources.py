"""How models are named on the command line: `[NAME=]PATH_OR_HUB_ID[@LAYERS]`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmosaic.client.model.load import load_base_model
from fedmosaic.protos.errors import ConfigurationError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ModelSource:
    """One model of an alignment.

    It has the name of its checkpoint's folder, a local folder or hub id, how many of its first layers to keep
    (None for all), and the type of its frozen weights.
    """

    name: str
    path: str
    keep_layers: int | None = None
    dtype: str = "float32"

    @property
    def spec(self) -> str:
        """The model as named on the command line, without its own name."""
        return self.path if self.keep_layers is None else f"{self.path}@{self.keep_layers}"

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model, frozen, and its tokenizer."""
        model, tokenizer = load_base_model(self.path, self.dtype, keep_layers=self.keep_layers)
        model.requires_grad_(False)
        return model, tokenizer


def parse_source(text: str, dtype: str = "float32") -> ModelSource:
    """Parse `[NAME=]PATH_OR_HUB_ID[@LAYERS]`, such as `org/Llama-3.2-1B` or `small=./models/smol@8`."""
    label, equals, rest = text.partition("=")
    if not equals:
        label, rest = "", text
    path, at, layers = rest.rpartition("@")
    if not at or not layers.isdigit():
        path, layers = rest, ""
    if not path:
        raise ConfigurationError(f"{text!r} names no model; write a folder or a hub id.")
    cut = int(layers) if layers else None
    name = label or (Path(path).name or path.replace("/", "-")) + (f"-first{cut}" if cut else "")
    if not _NAME.fullmatch(name) or name.endswith(".json"):
        raise ConfigurationError(
            f"{name!r} cannot name a checkpoint's folder; write NAME=MODEL, NAME of letters, digits, - or _."
        )
    return ModelSource(name, path, cut, dtype)
