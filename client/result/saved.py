"""`model.json` in a state directory: how to load the member's own model again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import tyro
from peft import PeftModel
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import fedmosaic.client.colora  # noqa: F401  # registers Co-LoRA with PEFT
from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.load import load_model, without_rename_notice
from fedmosaic.client.settings import IN_MEMORY, ClientSettings, ModelSettings
from fedmosaic.client.state import newest_adapter
from fedmosaic.client.vision.inputs import VisionInputs, open_images
from fedmosaic.privacy.configuration import Frozen, read_configuration
from fedmosaic.privacy.federation.roster import Roster
from fedmosaic.privacy.federation.terms import Protection
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError, StateError

RECORD: Final = "model.json"


class SavedModel(Frozen):
    """How a member's model is loaded, and what the federation agreed on about its adapter."""

    version: Literal[1] = 1
    federation: str
    client: str
    rounds: int
    """Rounds that the members agreed on."""
    protection: Protection
    backend: str
    """What encrypts, where the protection does."""
    blend_received: float
    """Largest share, of any start, of what was received in what the shared branch began a round with."""
    model: ModelSettings
    max_length: int
    """Tokens of a prompt and its answer, in training and afterwards."""
    pictures: Path | None = None
    projector: Path | None = None

    @classmethod
    def of(cls, settings: ClientSettings, roster: Roster, client: str) -> "SavedModel":
        """What is written when a client begins."""
        terms = roster.terms
        return cls(
            federation=roster.federation,
            client=client,
            rounds=terms.schedule.rounds,
            protection=terms.adapter.protection,
            backend=terms.encryption.backend,
            blend_received=settings.training.blend_received,
            model=settings.model,
            max_length=settings.training.max_length,
            pictures=settings.data.pictures,
            projector=settings.projector,
        )

    def write(self, state: Path) -> None:
        """Write it into a state directory, whose adapter may hold what an earlier start blended into it."""
        most = self.blend_received
        if (state / RECORD).exists():
            most = max(most, read_saved(state).blend_received)
        kept = self.model_copy(update={"blend_received": most})
        write_atomically(state / RECORD, kept.model_dump_json(indent=2).encode())


def read_saved(state: Path) -> SavedModel:
    """Read what a client wrote when it began; StateError if there is none, or it is damaged."""
    file, remedy = state / RECORD, "start `fedmosaic client` with its client.toml, which writes it anew"
    if not file.exists():
        begun = (state / "session.json").exists()
        raise StateError(
            f"{state} has no {RECORD}, which tells the base model; {remedy}"
            if begun
            else f"{state} is no client's state directory; give the state_dir of a client that has begun"
        )
    try:
        return read_configuration(file, SavedModel)
    except ConfigurationError as error:
        raise StateError(f"{error}; delete that file and {remedy}") from None


@dataclass(frozen=True)
class OpenedModel:
    """A member's model with the adapter of a round, ready to generate, and how its base was loaded."""

    saved: SavedModel
    settings: ModelSettings
    round: int
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Which member's model a command opens, and where."""

    state: tyro.conf.Positional[Path]
    """The client's state directory."""
    base: str | None = None
    """Folder or hub id of the base model, if it is not where the client had it."""
    device: str | None = None
    """Where to compute; as in the client's settings if left out."""

    def open(self, needs: Sequence[Example] = ()) -> OpenedModel:
        """Load the member's own model; `needs` are examples whose images it will read.

        Raises:
            StateError: there is no adapter yet, or it is damaged; see also `read_saved`.
            ModelError: the base model cannot be loaded, or is another one.
            ConfigurationError: there is no such device, or no place of the base model.
        """
        saved = read_saved(self.state)
        newest = newest_adapter(self.state)
        if newest is None:
            raise StateError(f"{self.state} holds no adapter yet; it is there after the client's first round")
        settings = _settings(saved.model, self.device, self.base)
        disable_progress_bar()
        loaded, tokenizer = load_model(settings)
        try:
            with without_rename_notice():
                model = PeftModel.from_pretrained(loaded, newest[1])
        except FedMosaicError:
            raise
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise StateError(
                f"{newest[1]}: the adapter cannot be read ({str(error)[:200]}); restore the folder from a "
                "backup"
            ) from None
        model.train(False)
        if needs:
            inputs = VisionInputs(settings.path, saved.pictures, saved.projector)
            tokenizer = open_images(inputs, model, tokenizer, needs, saved.max_length)
        return OpenedModel(saved, settings, newest[0], model, tokenizer)


def _settings(model: ModelSettings, device: str | None, base: str | None) -> ModelSettings:
    if base is None and model.path == IN_MEMORY.path:
        raise ConfigurationError(
            "the client was handed its model in Python, and where that lies is not known; give --base, its "
            "folder or hub id, or use the `model` of what `Client.run` returns"
        )
    changes = {name: value for name, value in (("device", device), ("path", base)) if value is not None}
    try:
        return ModelSettings.model_validate(model.model_dump() | changes)
    except ValidationError as error:
        raise ConfigurationError(f"--device is {device!r}: {error.errors()[0]['msg']}") from None
