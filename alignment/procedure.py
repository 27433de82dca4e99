"""The alignment of a federation's models, start to end: a star around one anchor.

Models are read one after the other and forgotten; what stays of each is its bases and two small matrices
that say how much of the anchor's latent it shares. That latent is wider than the rank at first. When all are
read, it is rotated so that its leading dimensions are the best shared ones, and only those are kept.
"""

import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

from fedmosaic.alignment.activations import ModuleKey, PairMoments, Side, collect, open_side
from fedmosaic.alignment.anchor import BasisPair, principal_basis, random_basis, weight_basis
from fedmosaic.alignment.blocks import choose_layers, measure_similarity
from fedmosaic.alignment.checkpoint import (
    Bases,
    Finished,
    Manifest,
    basis_label,
    check_replaceable,
    digest_of,
    model_digest,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
    write_manifest,
)
from fedmosaic.alignment.report import heat_map
from fedmosaic.alignment.settings import AlignmentSettings
from fedmosaic.alignment.sources import ModelSource
from fedmosaic.alignment.subspace import (
    Sharing,
    align_inputs,
    align_outputs,
    nearest_orthonormal_rows,
    prediction_share,
    shared_rotation,
    sharing,
)
from fedmosaic.alignment.tokens import PublicText
from fedmosaic.client.colora import find_decoder_layers
from fedmosaic.protos.errors import ConfigurationError, StateError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Kept:
    """What stays of one module of a model until all are read.

    A (k, d_in) and B (d_out, k) for k ≥ r directions of the anchor, not orthonormal yet, and how much of them
    the model shares.
    """

    a: torch.Tensor
    b: torch.Tensor
    inputs: Sharing
    outputs: Sharing


Kept = dict[ModuleKey, _Kept]
Stage = Callable[[str], Callable[[int, int], None]]
"""Called with the name of a stage; gives a function that is called with what is done and the total."""

_SIMILARITY_TEXTS: Final = 200
_SPARE: Final = 8
"""Directions of the anchor among which the shared ones are sought, times the rank."""


def align_models(
    anchor: ModelSource,
    models: Sequence[ModelSource],
    texts: Callable[[Side], Sequence[PublicText]],
    out: Path,
    settings: AlignmentSettings,
    stage: Stage,
) -> Manifest:
    """Align models to an anchor and write their checkpoints; what is finished already is kept.

    Without other models the anchor's checkpoint alone is written, on its own leading directions. The public
    texts come from the anchor if they are synthetic. `ConfigurationError` if two models have one name,
    `StateError` if the directory holds an alignment to something else, `ModelError` if a model does not fit.
    """
    names = [anchor.name, *(model.name for model in models)]
    if len(set(names)) != len(names):
        raise ConfigurationError(
            f"The models are {', '.join(names)}; give each once (write NAME=MODEL to tell two apart)."
        )
    settings.check()
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        check_replaceable(out / name)
    run = _Run(anchor, texts, out, settings, stage, spare=_SPARE if models else 1)
    for model in models:
        run.read(model)
    return run.finish()


class _Run:
    """State of one run: the anchor in memory, one other model at a time."""

    def __init__(
        self,
        source: ModelSource,
        texts: Callable[[Side], Sequence[PublicText]],
        out: Path,
        settings: AlignmentSettings,
        stage: Stage,
        *,
        spare: int,
    ) -> None:
        self._out, self._settings, self._stage = out, settings, stage
        self._source = source
        model, tokenizer = source.load()
        depth = len(find_decoder_layers(model)[1])
        first_rule = "relative_depth" if settings.layer_rule == "cka" else settings.layer_rule
        layers = choose_layers(depth, range(settings.blocks), first_rule)
        self._anchor = open_side(model, tokenizer, layers, settings.target_modules or None)
        self._config = settings.adapter(layers, first_rule)
        self._texts = texts(self._anchor)
        self._digest = digest_of(_known(settings), model_digest(model), [asdict(t) for t in self._texts])
        self._manifest = self._opened()
        self._waiting: list[tuple[ModelSource, Finished, Kept]] = []
        self._bases = self._anchor_bases(spare)

    def _opened(self) -> Manifest | None:
        manifest = read_manifest(self._out)
        if manifest is not None and manifest.anchor.digest != self._digest:
            raise StateError(
                f"{self._out} holds an alignment to {manifest.anchor.model} made from another anchor, other "
                "public text or other settings; choose another --out, or remove the directory."
            )
        return manifest

    def _anchor_bases(self, spare: int) -> Bases:
        if self._manifest is not None:
            return read_checkpoint(self._out / self._manifest.anchor.folder, self._anchor, self._config)
        if self._settings.method == "random":
            return random_basis(self._anchor, self._settings.rank, self._settings.seed)
        if self._settings.method == "weights":
            return weight_basis(self._anchor, self._settings.rank)
        moments = self._moments(self._anchor, f"{self._source.name}: its own subspace")
        return principal_basis(self._anchor, self._settings.rank, moments, spare=spare)

    def _moments(self, side: Side, stage: str) -> PairMoments:
        return collect(
            self._anchor,
            side,
            self._texts,
            self._settings.reading(),
            self._settings.method,
            self._stage(stage),
        )

    def read(self, source: ModelSource) -> None:
        """Align one model, unless it is finished."""
        model, tokenizer = source.load()
        digest = digest_of(self._digest, model_digest(model))
        if self._manifest is not None:
            for done in self._manifest.models:
                if done.folder == source.name and done.digest == digest:
                    log.info("%s is finished already", source.name)
                    return
        started = time.monotonic()
        similarity = measure_similarity(
            (self._anchor.model, self._anchor.tokenizer),
            (model, tokenizer),
            self._texts[:_SIMILARITY_TEXTS],
            self._settings.reading(),
            self._stage(f"{source.name}: similarity of layers"),
        )
        layers = choose_layers(
            len(find_decoder_layers(model)[1]), self._anchor.layers, self._settings.layer_rule, similarity
        )
        side = open_side(model, tokenizer, layers, self._settings.target_modules or None)
        moments = self._moments(side, f"{source.name}: activations")
        kept = self._aligned(moments)
        pairs = zip(self._anchor.layers, layers, strict=True)
        figure = self._out / f"cka-{source.name}.svg"
        heat_map(similarity, self._source.name, source.name, pairs, figure)
        report = _quality(moments, self._bases, kept, self._settings.rank) | {
            "texts": moments.texts,
            "positions": moments.positions,
            "seconds": round(time.monotonic() - started, 1),
            "anchor_layers": self._anchor.layers,
            "cka_of_pairs": [round(v, 4) for v in similarity.of_pairs(self._anchor.layers, layers)],
            "cka_mean_deviation": round(similarity.mean_deviation(), 4),
            "peak_memory_mib": _peak_memory(),
        }
        finished = Finished(
            model=source.spec, folder=source.name, digest=digest, layers=layers, report=report
        )
        self._waiting.append((source, finished, kept))

    def _aligned(self, moments: PairMoments) -> Kept:
        kept: Kept = {}
        progress = self._stage("bases")
        for key, (a, b) in self._bases.items():
            inputs, effects = moments.inputs[key], moments.effects[key]
            kept[key] = _Kept(
                a=align_inputs(inputs, a),
                b=align_outputs(effects, b, self._settings.method),
                inputs=sharing(inputs, a),
                outputs=sharing(effects, b.T),
            )
            progress(len(kept), len(self._bases))
        return kept

    def finish(self) -> Manifest:
        """Turn the latent, and write what is not written yet."""
        turns = self._rotations() if self._manifest is None and self._waiting else {}
        if self._manifest is None:
            self._bases = _turned(self._bases, turns)
            label = basis_label(self._bases)
            folder = self._out / self._source.name
            write_checkpoint(folder, self._anchor, self._bases, self._config, label)
            done = Finished(
                model=self._source.spec,
                folder=self._source.name,
                digest=self._digest,
                layers=self._anchor.layers,
            )
            self._manifest = Manifest(settings=asdict(self._settings), label=label, anchor=done)
        for source, finished, kept in self._waiting:
            model, tokenizer = source.load()
            side = open_side(model, tokenizer, finished.layers, self._settings.target_modules or None)
            found = _turned({key: (kept[key].a, kept[key].b) for key in self._bases}, turns)
            bases = {
                key: (nearest_orthonormal_rows(a), nearest_orthonormal_rows(b.T).T)
                for key, (a, b) in found.items()
            }
            config = self._settings.adapter(finished.layers, self._config.layer_rule)
            write_checkpoint(self._out / source.name, side, bases, config, self._manifest.label)
            others = tuple(done for done in self._manifest.models if done.folder != source.name)
            self._manifest = self._manifest.model_copy(update={"models": (*others, finished)})
        write_manifest(self._out, self._manifest)
        return self._manifest

    def _rotations(self) -> dict[ModuleKey, tuple[torch.Tensor, torch.Tensor]]:
        rank, models = self._settings.rank, [kept for _, _, kept in self._waiting]
        return {
            key: (
                shared_rotation([kept[key].inputs for kept in models])[:rank],
                shared_rotation([kept[key].outputs for kept in models])[:rank],
            )
            for key in self._bases
        }


def _turned(
    bases: Bases, turns: Mapping[ModuleKey, tuple[torch.Tensor, torch.Tensor]]
) -> dict[ModuleKey, BasisPair]:
    if not turns:
        return dict(bases)
    return {key: (turns[key][0] @ a, b @ turns[key][1].T) for key, (a, b) in bases.items()}


def _known(settings: AlignmentSettings) -> dict[str, Any]:
    """Settings for the digest in the words of earlier versions, whose directories can be extended."""
    known = asdict(settings) | {"input_method": "ridge", "other_layers": "none"}
    method = known.pop("method")
    output = method if method == "cotangents" else "cca"
    return known | {"anchor_basis": method, "output_method": output}


def _quality(moments: PairMoments, anchor: Bases, kept: Kept, rank: int) -> dict[str, Any]:
    """Mean squared correlation of aligned directions, by block, of those that this model shares best."""
    shares: dict[str, dict[int, list[float]]] = {"inputs": {}, "outputs": {}}
    for key in sorted(anchor):
        (a, b), own = anchor[key], kept[key]
        for side, found, left, right, shared in (
            ("inputs", moments.inputs[key], a, own.a, own.inputs),
            ("outputs", moments.effects[key], b.T, own.b.T, own.outputs),
        ):
            turn = shared_rotation([shared])[:rank]
            share = prediction_share(found, turn @ left, turn @ right)
            shares[side].setdefault(key[0], []).append(float(share.mean()))
    return {
        f"{side}_squared_correlation": [round(fmean(values), 4) for values in by_block.values()]
        for side, by_block in shares.items()
    }


def _peak_memory() -> int:
    """Largest resident set of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
