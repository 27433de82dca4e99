"""The model card of what a member exports: what is inside, ε per adversary, and who may have it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmosaic import __version__
from fedmosaic.client.result.saved import SavedModel
from fedmosaic.privacy.statement.models import Guarantee, PrivacyStatement
from fedmosaic.privacy.statement.plain import epsilon_text
from fedmosaic.privacy.statement.words import ADVERSARY_NAMES, CHANNEL_NAMES

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
    """The card as Markdown; of what is shareable, by the statement handed over. None before the run's end."""
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
        **asdict(export), **_figures(statement), saved=saved, private="dp" in saved.protection,
        encrypted="encrypted" in saved.protection, version=__version__, gguf=gguf, options=options,
        names=[*names, *["BitsAndBytesConfig"] * bool(model.quantization)],
    )  # fmt: skip


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
