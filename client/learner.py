"""The model side of a client: base model, adapter, data, training and scoring."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from fedmosaic.client.colora import copy_branch, read_family, set_active_branches, set_trainable, write_family
from fedmosaic.client.colora.aligned import read_embedded, write_embedded
from fedmosaic.client.data.records import ClientData, read_sets, unit_ids
from fedmosaic.client.dp import training as private_round
from fedmosaic.client.model.acceptance import check_ids, check_length
from fedmosaic.client.model.adapted import agreed_layout, load_adapted
from fedmosaic.client.model.examples import EncodedExample, Example, encode_examples, padding_token
from fedmosaic.client.model.load import LoadedModel, save_adapter
from fedmosaic.client.model.scoring import Examiner, Score
from fedmosaic.client.model.training import EpochSampler, train_local
from fedmosaic.client.progress import Progress
from fedmosaic.client.round.releases import Releases
from fedmosaic.client.settings import ClientSettings, TrainingSettings
from fedmosaic.client.vision.inputs import VisionInputs, open_images
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.federation.terms import AdapterTerms, Terms
from fedmosaic.protos.errors import ConfigurationError, StateError, TrainingError

log = logging.getLogger(__name__)
_ADAPTER = "default"
SAMPLER = "sampler.json"
"""Beside a saved adapter: where the walk over the examples stood."""
_FEATURES = "picture-features"
_EVALUATION_BATCH = 16


class ModelLearner:
    """One client's model with its adapter, and its examples."""

    def __init__(
        self,
        settings: ClientSettings,
        terms: Terms,
        family: str,
        progress: Progress,
        *,
        loaded: tuple[PeftModel, PreTrainedTokenizerBase] | None = None,
        base: LoadedModel | None = None,
        data: ClientData | None = None,
    ) -> None:
        """Load model and data and put a fresh adapter on.

        `loaded` is a model of `load_adapted` where several clients take turns on one, `base` an accepted
        model instead of the settings', `data` the examples, if they were read. ModelError if the model cannot
        be adapted, has no row for a token, or cannot be trained as the terms want it; PrivacyError if a
        tensor that sees private data would take part; ConfigurationError for unreadable or too long examples.
        """
        self._settings = settings
        self._terms = terms
        self._family = family
        self._progress = progress
        # Told the loss of every step of a round. It is private: for the client's own people alone.
        self.track: Callable[[Mapping[str, float], int], None] = lambda figures, step: None
        self._data = data or read_sets(settings.data)
        self._model, self._tokenizer = loaded or _load(settings, terms.adapter, base, self._data)
        self._train = self._data.train.examples
        check_length(self._model, settings.training.max_length, "training.max_length")
        self._encoded = encode_examples(
            self._tokenizer, self._train, settings.training.max_length, setting="training.max_length"
        )
        check_ids(self._model, (e.input_ids for e in self._encoded), self._data.train.label, "model.path")
        self._sampler = EpochSampler(len(self._encoded), settings.training.seed)
        self._received: set[str] = set()
        # From where training alone goes on: tensors, place in the data, rounds done.
        self._alone = self._stand(0)
        if terms.adapter.private:
            private_round.check_model(self._model, terms, settings.training)
        if self._shares_family:
            self._check_family_size()
        else:
            # Nothing comes back for these layers, so their LoRA is the client's own, at full weight.
            self._own_family_layers()

    @property
    def _shares_family(self) -> bool:
        return self._family in self._terms.adapter.family_dimensions

    def _check_family_size(self) -> None:
        agreed, size = self._terms.adapter.family_dimensions[self._family], read_family(self._model).size
        if size != agreed:
            raise ConfigurationError(
                f"by the terms' adapter.family_dimensions family {self._family!r} shares {agreed:,} values "
                f"of its other layers, and this model has {size:,}: a family has one model and one rank. "
                f"Give the family's model, or found the federation with {self._family!r} = {size}"
            )

    def _own_family_layers(self) -> None:
        if self._terms.adapter.other_layers == "lora":
            set_active_branches(self._model, {"local"}, layers="family")

    @property
    def trained(self) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The model with its adapter, in evaluation mode, and its tokenizer."""
        self._model.train(False)
        return self._model, self._tokenizer

    @property
    def adapter_spec_hash(self) -> bytes:
        """SHA-256 of the shared layout (32 bytes), at the federation's rank."""
        return bytes.fromhex(agreed_layout(self._model, self._terms.adapter).spec_hash)

    @property
    def family(self) -> str:
        """Architecture name, as on the roster."""
        return self._family

    @property
    def example_count(self) -> int:
        """Number n of the client's units, examples or persons as the terms say. Private under add/remove."""
        return len(self.example_ids)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The client's training examples."""
        return self._train

    @property
    def example_ids(self) -> tuple[str, ...]:
        """Ids of the units that the terms protect, of which the data epoch is made. They never leave."""
        return unit_ids(self._train, self._terms.unit)

    def load_global(self, section: str, vector: np.ndarray) -> None:
        """Load an aggregate into the frozen global branch, of a lower rank its leading block."""
        if section == "shared":
            write_embedded(self._model, vector, self._terms.adapter.rank)
        else:
            write_family(self._model, vector, "global")
        self._received.add(section)

    def keep_own(self, section: str) -> None:
        """Without an aggregate the global branch is a copy of the local one (released code, §2.6)."""
        copy_branch(self._model, "local", "global", layers=section)
        self._received.discard(section)

    def sections(self) -> Mapping[str, np.ndarray]:
        """What is shared now, by section name."""
        shared = {"shared": read_embedded(self._model, self._terms.adapter.rank)}
        return shared | ({"family": read_family(self._model)} if self._shares_family else {})

    def training_data(self, round_number: int) -> tuple[Sequence[EncodedExample], EpochSampler]:
        """What to train on in a round, and in which order; here all examples in every round."""
        return self._encoded, self._sampler

    def train(self, round_number: int, releases: Releases, give_up: Callable[[], None]) -> None:
        """See `Learner.train` of a membership; TrainingError in round 1 without DP alone."""
        private = self._terms.adapter.private
        if private:
            self._blend_received()
            self._private_round(releases, self._training_of(round_number)).train(round_number)
        self._open_personal_parts()
        # What the server sees of a failure tells about the data, and about what was decrypted.
        may_fail = round_number == 1 and not private
        self._train_locally(round_number, None if may_fail else give_up)
        if may_fail:
            self._alone = self._stand(1)  # nothing was received yet, so this round is the same alone

    def _training_of(self, round_number: int) -> TrainingSettings:
        if self._terms.adapter.in_group_sums:
            return self._settings.training  # the personal part is trained once, after the last round
        return self._settings.training.of_round(round_number, self._terms.schedule.rounds)

    def _open_personal_parts(self) -> None:
        """Train what the second half of a round trains: all without DP, what stays here under it."""
        if self._terms.adapter.private:
            private_round.open_personal_branches(self._model, self._terms.adapter)
        else:
            set_trainable(self._model, {"local", "gate"})
        if not self._shares_family:
            self._own_family_layers()

    def load_shared(self, vector: np.ndarray) -> None:
        """The shared branch, which is public to the group: local and global branch alike."""
        write_embedded(self._model, vector, self._terms.adapter.rank)
        copy_branch(self._model, "global", "local", layers="shared")

    def group_share(self, round_number: int, members: int, releases: Releases) -> np.ndarray | None:
        """See `fedmosaic.client.dp.training.PrivateRound.share`."""
        return self._private_round(releases, self._settings.training).share(round_number, members)

    def _private_round(self, releases: Releases, training: TrainingSettings) -> private_round.PrivateRound:
        return private_round.PrivateRound(
            self._model, self._encoded, self._terms, training, releases, self._progress
        )

    def train_personal(self, round_number: int) -> None:
        """Train what never leaves, on top of the shared branch."""
        private_round.open_personal_branches(self._model, self._terms.adapter)
        self._own_family_layers()
        self._train_locally(round_number, lambda: None)

    def _train_locally(
        self, round_number: int, give_up: Callable[[], None] | None, *, alone: bool = False
    ) -> None:
        """Train whatever is trainable, for as many steps as ever, also where some of them fail."""
        before = {name: p.detach().clone() for name, p in self._model.named_parameters() if p.requires_grad}
        if not self._terms.adapter.private:
            self._blend_received()
        settings = self._training_of(round_number)
        steps = settings.steps
        self._progress.stage(round_number, "training alone, to compare" if alone else "training", steps)
        examples, order = self.training_data(round_number)
        done = 0

        def advance(step: int, _total: int, loss: float) -> None:
            self._progress.advance(done + step)
            if not alone:
                self.track({"loss": loss}, (round_number - 1) * steps + done + step)

        while done < steps:
            try:
                left = settings.model_copy(update={"steps": steps - done})
                pad = padding_token(self._tokenizer)
                report = train_local(
                    self._model, examples, left, pad_token_id=pad, sampler=order, progress=advance
                )
                # For this client's own people alone: a loss is a function of private examples.
                words = "round %d: training loss %.3f → %.3f nats per token"
                log.info(words, round_number, report.first_loss, report.last_loss)
                return
            except TrainingError as error:
                if give_up is None:
                    raise
                done += error.steps
                words = (
                    "round %d: %s. What was received is given up, and what was trained in this round; "
                    "%d of %d steps are left"
                )
                log.error(words, round_number, error, steps - done, steps)
                with torch.no_grad():
                    for name, parameter in self._model.named_parameters():
                        if name in before:
                            parameter.copy_(before[name])
                for section in self.sections():
                    self.keep_own(section)
                give_up()

    def _blend_received(self) -> None:
        """Move the local branch towards what was received, by `training.blend_received`."""
        if share := self._settings.training.blend_received:
            for section in sorted(self._received):
                copy_branch(self._model, "global", "local", share=share, layers=section)

    def evaluate(self, *, adapted: bool = True) -> dict[str, Score]:
        """Score the own test set ("self") and the others', by name, or so the base model. Stays local."""
        scores: dict[str, Score] = {}
        self._progress.stage(0, "scoring", len(self._data.tests))
        with nullcontext() if adapted else self._model.disable_adapter():
            for done, (name, found) in enumerate(self._data.tests.items(), start=1):
                scores[name] = self._score(name, found.examples)
                self._progress.advance(done)
        return scores

    def _score(self, name: str, examples: Sequence[Example]) -> Score:
        data = self._settings.data
        limit = (data.evaluation_examples if name == "self" else data.others_examples) or len(examples)
        return self._examiner.score(examples[:limit])

    @property
    def _examiner(self) -> Examiner:
        longest = self._settings.training.max_length
        return Examiner(self._model, self._tokenizer, _EVALUATION_BATCH, longest)

    def score_alone(self, rounds: int) -> Score | None:
        """Train a second adapter without anything received, score it on the own test rows, and forget it.

        Each round does what a round does when no aggregate came. Under DP the shared branch is left out:
        whoever is alone shares nothing and needs no noise. Its training reads private data without noise, and
        no ledger is charged. That is no release: it begins when the last upload and the statement have been
        sent, its tensors are dropped here, and its score stays in the state directory. Whoever hands that
        score on releases it. None without own test rows, or if training fails.
        """
        test = self._data.tests.get("self")
        if test is None:
            return None
        federated, sampler, received = self._adapter_tensors(), self._sampler, self._received
        try:
            tensors, place, done = self._alone
            set_peft_model_state_dict(self._model, tensors, adapter_name=_ADAPTER)
            self._sampler = EpochSampler(len(self._encoded), self._settings.training.seed)
            self._sampler.load_state_dict(place)
            self._received = set()
            for number in range(done + 1, rounds + 1):
                for section in self.sections():
                    self.keep_own(section)
                self._open_personal_parts()
                self._train_locally(number, None, alone=True)
            return self._score("self", test.examples)
        except TrainingError as error:
            log.error("no score of training alone: %s", error)
            return None
        finally:
            set_peft_model_state_dict(self._model, federated, adapter_name=_ADAPTER)
            self._sampler, self._received = sampler, received

    def _stand(self, rounds: int) -> tuple[dict[str, torch.Tensor], dict[str, int], int]:
        tensors = self._adapter_tensors() if self._settings.compare_alone else {}
        return tensors, self._sampler.state_dict(), rounds

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(self._model).items()}

    def check_tests(self) -> None:
        """Refuse test sets that could not be scored after the last round; see `Examiner.check`."""
        for name, found in self._data.tests.items():
            self._examiner.check(found.examples, f"test set {name!r}")

    def save(self, directory: Path) -> None:
        """Write every branch, the gate, and the sampler's position; StateError if the disk takes them not."""
        try:
            save_adapter(self._model, directory)
        except SafetensorError as error:
            # It wraps what the operating system said, and names no file.
            raise StateError(
                f"{directory}: the adapter cannot be written ({error}); see that there is room, and start "
                "again: what was stored before is kept"
            ) from None
        (directory / SAMPLER).write_text(json.dumps(self._sampler.state_dict()))

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; StateError if it is missing or damaged."""
        try:
            tensors = load_file(directory / "adapter_model.safetensors")
            report: Any = set_peft_model_state_dict(self._model, tensors, adapter_name=_ADAPTER)
            if report.unexpected_keys:
                raise ValueError(f"it is of another shape ({report.unexpected_keys[0]})")
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StateError) as error:
            raise StateError(
                f"{directory}: the saved adapter cannot be read ({str(error)[:200]}); restore the folder "
                "from a backup, or delete it: the client then goes on with a fresh adapter, and what the "
                "ledger has spent stays spent"
            ) from None
        order = directory / SAMPLER
        if not order.exists():
            log.warning("%s is not there; the order of the examples starts over", order)
            return
        try:
            self._sampler.load_state_dict(parse_json(order.read_bytes()))
        except (OSError, ValueError, StateError) as error:
            raise StateError(f"{order}: {error}; delete that file, and the order starts over") from None


def _load(
    settings: ClientSettings, adapter: AdapterTerms, base: LoadedModel | None, data: ClientData
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_adapted(settings.model, adapter, base)
    examples = [example for found in (data.train, *data.tests.values()) for example in found.examples]
    kept = settings.state_dir / _FEATURES
    source = settings.model.path if base is None else str(base[0].name_or_path)
    inputs = VisionInputs(source, settings.data.pictures, settings.projector, features=kept)
    return model, open_images(inputs, model, tokenizer, examples, settings.training.max_length)
