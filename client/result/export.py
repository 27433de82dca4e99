"""`fedmosaic export STATE --out DIR`: what the member owns, in a form that others' software loads.

Its model card says what is inside, ε per adversary, and who may have it.
"""

import json
import math
import re
import shutil
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, cast

import torch
import tyro
from jinja2 import Environment, PackageLoader, StrictUndefined
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedmosaic import __version__
from fedmosaic.client.colora.state import find_adapter, shared_modules
from fedmosaic.client.model.load import load_base_model, save_adapter, without_rename_notice
from fedmosaic.client.result.plain import deviation, merged, only_released, public_logits, write_lora
from fedmosaic.client.result.saved import OpenedModel, Opening, SavedModel, read_saved
from fedmosaic.client.statement import HANDED_OVER, STATEMENT
from fedmosaic.privacy.configuration import parse_json, read_own
from fedmosaic.privacy.files import make_private, private_directory
from fedmosaic.privacy.statement.models import Guarantee, PrivacyStatement
from fedmosaic.privacy.statement.plain import epsilon_text
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES, CHANNEL_NAMES
from fedmosaic.protos.errors import ConfigurationError, ModelError, PrivacyError, StateError

Format = Literal["colora", "lora", "merged"]
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_FOUR_BITS: Final = (
    ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)"
)


@dataclass(frozen=True)
class Export:
    """What is written, for its card.

    The base and its dtype are named for readers, with no private path; `shareable` says that only what is a
    private release is inside; `rank` is the LoRA's. `checked` tells how far the written model is from the
    member's own, `left_out` what leaving out Q changes, empty where it is in.
    """

    form: Format
    base: str
    dtype: str
    round: int
    shareable: bool
    rank: int | None
    checked: str
    left_out: str


def guarantees(statement: PrivacyStatement, channel: str) -> dict[str, Guarantee]:
    """What holds for a statement's first client on one channel, by adversary."""
    found = (guarantee for guarantee in statement.clients[0].guarantees if guarantee.channel == channel)
    return {guarantee.adversary: guarantee for guarantee in found}


def model_card(export: Export, saved: SavedModel, statement: PrivacyStatement | None) -> str:
    """The card as Markdown.

    The statement is the member's own, or of what is shareable the one handed over; None before the end.
    """
    # Markdown, not HTML: nothing is escaped, and all names come from the roster or this member's settings.
    environment = Environment(  # noqa: S701
        loader=PackageLoader("fedmosaic.client.result", "."),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    model = saved.model
    gguf = f', gguf_file="{model.gguf_file}"' if model.gguf_file else ""
    # Without it transformers takes the type that the files are in, which need not be the one trained with.
    options = (
        f', dtype="{export.dtype}"'
        + (", config=config" if model.keep_layers else "")
        + (_FOUR_BITS if model.quantization else "")
    )
    names = ["AutoConfig"] * bool(model.keep_layers) + ["AutoModelForCausalLM", "AutoTokenizer"]
    return environment.get_template("card.md.j2").render(
        **asdict(export),
        **_figures(statement),
        saved=saved,
        private="dp" in saved.protection,
        encrypted="encrypted" in saved.protection,
        version=__version__,
        gguf=gguf,
        options=options,
        names=[*names, *["BitsAndBytesConfig"] * bool(model.quantization)],
    )


def _figures(statement: PrivacyStatement | None) -> dict[str, object]:
    if statement is None:
        return {"client": None}
    channels = [name for name in CHANNEL_NAMES if guarantees(statement, name)]
    figures = [guarantees(statement, name) for name in channels]
    table = [
        (words, [epsilon_text(of[name].epsilon) if name in of else "-" for of in figures])
        for name, words in ADVERSARY_NAMES.items()
    ]
    return {
        "client": statement.clients[0],
        "delta": statement.clients[0].delta,
        "created": statement.created or "the end of the run",
        "no_guarantee": statement.no_guarantee,
        "channels": {name: CHANNEL_NAMES[name] for name in channels},
        "table": table,
    }


def public_name(path: str) -> str:
    """What to call a base model before others: its hub id, or the last part of its folder's name."""
    hub = _HUB_ID.fullmatch(path) and not Path(path).exists()
    return path if hub else Path(path).name


_KEY: Final = (
    "With CKKS, a decrypted aggregate together with its ciphertext gives away the key of all members, so it "
    "must not leave (Li and Micciancio 2021)"
)
_COLUMNS: Final = 80
_TOLERANCE: Final = 1e-4
"""Of the logits' norm, in float32: more than rounding, less than any adapter that does something."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Opening):
    """Write the model that a client has trained, with a card that says what is inside and who may have it."""

    out: Path
    """Folder to write; made, and must not be there with anything in it."""
    format: Format = "colora"
    """colora: the adapter for PEFT with fedmosaic. lora: plain LoRA for PEFT alone. merged: a whole model."""
    shareable: bool = False
    """Leave out everything that is not a differentially private release; refuse where there is none."""
    without_bias: bool = False
    """Leave out Q, for programs that take no bias; the card says what that changes."""
    name_base: str | None = None
    """What to call the base model in what is written; its hub id, or its folder's last name, if left out."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic export` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic export")
    card = export(parsed)
    lines = [f"written to {parsed.out}: {card.form}" + (f", rank {card.rank}" if card.rank else "")]
    lines.append(f"loaded again and compared on public prompts: {card.checked}")
    if card.left_out:
        lines.append(f"without Q, against the client's model: {card.left_out}")
    lines.append(f"{'anybody may have it' if card.shareable else 'keep it inside'}; its README.md says why")
    for line in lines:
        print(textwrap.fill(line, _COLUMNS, break_long_words=False, break_on_hyphens=False))
    return 0


def export(arguments: Arguments) -> Export:
    """Write what is asked for.

    Raises:
        ConfigurationError: there is something where it is to be written.
        PrivacyError: what is in the state is not to be shared.
        StateError, ModelError: it cannot be loaded, or not be written in that form.
    """
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out} is there already; give a new folder, or move it away")
    saved = read_saved(arguments.state)
    handed = _statement(arguments.state / HANDED_OVER)
    if arguments.shareable:
        check_shareable(saved, handed)
    if arguments.format == "merged" and saved.model.quantization:
        raise ModelError(
            f"the model was trained on weights in 4 bits ({saved.model.quantization}). Dense weights with "
            "this adapter in them would be another model than the trained one; give --format colora or lora, "
            "and load it on the base in 4 bits, as the card says"
        )
    opened = arguments.open()
    name = arguments.name_base or public_name(opened.settings.path)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    private_directory(partial)
    card = _write(arguments, opened, partial, name)
    statement = handed if arguments.shareable else _statement(arguments.state / STATEMENT)
    (partial / "README.md").write_text(model_card(card, saved, statement), encoding="utf-8")
    make_private(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return card


def _write(arguments: Arguments, opened: OpenedModel, folder: Path, name: str) -> Export:
    """Write the model, load it again, and compare it with what it was made from."""
    model = only_released(opened.model) if arguments.shareable else opened.model
    expected = public_logits(model, opened.tokenizer)
    dtype = str(cast(PreTrainedModel, model.get_base_model()).dtype).removeprefix("torch.")
    left_out = ""
    if arguments.without_bias:
        adapter = find_adapter(model)
        for layer in shared_modules(model):
            for branch in layer.settings[adapter].branches:
                nn.init.zeros_(layer.core(adapter, branch).bias)
        bare = public_logits(model, opened.tokenizer)
        left_out, expected = str(deviation(bare, expected)), bare
    rank = None
    if arguments.format == "merged":
        device = next(model.parameters()).device
        whole = merged(model)
        whole.save_pretrained(str(folder))
        opened.tokenizer.save_pretrained(str(folder))
        again: nn.Module = load_base_model(folder, whole.dtype, device=device)[0]
    else:
        if arguments.format == "lora":
            rank = write_lora(model, folder, name)
        else:
            save_adapter(model, folder)
            # The base model is named as readers know it, not where it is on this machine.
            config = folder / "adapter_config.json"
            content = parse_json(config.read_bytes()) | {"base_model_name_or_path": name}
            config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        with without_rename_notice():
            # The card says what PEFT would say here: with a bias that the base has not, it cannot merge.
            warnings.filterwarnings("ignore", "`lora_bias=True` was passed but")
            again = PeftModel.from_pretrained(cast(PreTrainedModel, model.unload()), str(folder))
    found = deviation(public_logits(again, opened.tokenizer), expected)
    if found.relative > _TOLERANCE and next(again.parameters()).dtype == torch.float32:
        raise ModelError(
            f"what would be written is not the client's model ({found}); {arguments.format} does not suit "
            "this architecture; give another --format"
        )
    return Export(
        arguments.format, name, dtype, opened.round, arguments.shareable, rank, str(found), left_out
    )


def check_shareable(saved: SavedModel, handed: PrivacyStatement | None) -> None:
    """Refuse to share what is not a private release, or what gives away a key.

    Raises:
        PrivacyError: nothing in the state is a private release, the key would not be safe, or no guarantee
            holds.
        StateError: the run is not over: no statement was handed over.
    """
    if "dp" not in saved.protection:
        with_ckks = saved.protection == "encrypted" and saved.backend == "ckks"
        key = f"; and it holds a decrypted aggregate: {_KEY}" if with_ckks else ""
        raise PrivacyError(
            f"the federation's protection is {saved.protection!r}: nothing of the model was trained with "
            f"differential privacy, so no ε bounds what it tells of the examples{key}. Only protection 'dp', "
            "'dp+encrypted' or 'distributed-dp' makes what can be shared; without --shareable the model is "
            "written for the member's own use"
        )
    if "encrypted" in saved.protection and saved.blend_received > 0:
        raise PrivacyError(
            f"training.blend_received is {saved.blend_received}, so the shared branch began its rounds with "
            f"part of a decrypted aggregate, which several of its states give away. {_KEY}"
        )
    if handed is None:
        raise StateError(
            "there is no statement that was handed over: the run is not over, or it was one of a version "
            "before. What can be shared is known after the last round; run `fedmosaic client` to its end"
        )
    if handed.no_guarantee:
        raise PrivacyError("noise came from a test generator: no guarantee holds, so nothing can be shared")
    found = guarantees(handed, "adapter").get("recipient")
    if found is None or found.epsilon is None or math.isinf(found.epsilon):
        raise PrivacyError(
            "the statement gives no finite ε for the shared adapter towards its recipients: no private step "
            "was taken, so there is nothing to share"
        )


def _statement(file: Path) -> PrivacyStatement | None:
    return read_own(file, PrivacyStatement.model_validate, "restore it from a backup")
