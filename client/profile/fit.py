"""`fedmosaic probe`: fit the task profile's public map, once per federation, on public data."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fedmosaic.client.model.examples import encode_examples, read_public_examples
from fedmosaic.client.model.load import load_model
from fedmosaic.client.profile.basis import BasisSettings, fit_mechanism
from fedmosaic.client.profile.probe import open_probe
from fedmosaic.client.settings import DeviceName, DtypeName, ModelSettings
from fedmosaic.privacy.federation.kits import BASIS, PROFILE
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, Reduction
from fedmosaic.privacy.terminal import guarded


@dataclass(frozen=True)
class Arguments:
    """Fit the public map of the task profile, and print the terms to put into federation.toml.

    The public examples must not overlap with any member's data: the guarantee assumes that the map would
    be the same without each private example.
    """

    probe: str
    """Folder or hub id of the small frozen model that all members probe with."""
    public: Path
    """Public examples, JSON lines of prompt and answer; hundreds at least."""
    out: Path
    """Directory to write the basis and the terms to."""
    kind: Literal["kronecker", "tensor_sketch", "coordinates"] = "kronecker"
    """The reduction. `coordinates` is the paper's random dimension sampling."""
    dimensions: int = 128
    """Numbers in a release."""
    left: int = 4
    """Directions of the output gradient that `kronecker` keeps; of the input it keeps dimensions / left."""
    noise_multiplier: float = 8.0
    """σ, the noise's standard deviation over the clipping norm. 8 costs ε = 0.43 at δ = 1e-5 by itself."""
    device: DeviceName = "auto"
    """Where the probe computes."""
    dtype: DtypeName = "float32"
    """Weights of the probe in memory."""
    keep_layers: int | None = None
    """Cut the probe to its first layers."""
    max_length: int = 96
    """Tokens of an example that are read."""
    minimum_examples: int = 50
    """A data set smaller than this releases nothing."""


def fit(arguments: Arguments) -> ProfileMechanism:
    """Fit the map and write it; see `Arguments`."""
    model, tokenizer = load_model(
        ModelSettings(
            path=arguments.probe,
            device=arguments.device,
            dtype=arguments.dtype,
            keep_layers=arguments.keep_layers,
        )
    )
    probe = open_probe(model)
    mechanism, basis = fit_mechanism(
        probe,
        Path(arguments.probe).name,
        encode_examples(tokenizer, read_public_examples(arguments.public), arguments.max_length),
        Reduction(
            kind=arguments.kind,
            hidden_size=probe.hidden_size,
            intermediate_size=probe.intermediate_size,
            projection_dimensions=arguments.dimensions,
        ),
        BasisSettings(
            standardise="none" if arguments.kind == "coordinates" else "whiten",
            kronecker_shape=(arguments.left, arguments.dimensions // arguments.left),
        ),
        arguments.noise_multiplier,
    )
    mechanism = mechanism.model_copy(update={"minimum_examples": arguments.minimum_examples})
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / PROFILE).write_text(mechanism.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if basis is not None:
        basis.save(arguments.out / BASIS)
    return mechanism


def as_toml(mechanism: ProfileMechanism) -> str:
    """The mechanism as the `[terms.profile]` table of a federation.toml."""
    content = mechanism.model_dump(mode="json", exclude_none=True)
    # JSON's strings, numbers and booleans are TOML's.
    reduction, plain = (
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
        for table in (content.pop("reduction"), content)
    )
    return f"[terms.profile]\n{plain}\n\n[terms.profile.reduction]\n{reduction}"


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic probe` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic probe")
    mechanism = fit(parsed)
    print(f"# Put this into federation.toml and pass --basis {parsed.out / BASIS} to `fedmosaic keys init`.")
    print(as_toml(mechanism))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("fedmosaic probe", lambda: main(sys.argv[1:])))
