"""A client's configuration, `client.toml`. What all members agreed on is in the roster, not here.

Imports no model and no tensor: a configuration is read and refused before anything large is loaded.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.federation.names import Address
from fedmosaic.protos.errors import ConfigurationError

DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$")]
DtypeName = Literal["auto", "float32", "bfloat16"]
Role = Literal["adapter", "shared", "gate"]
"""Group of trainable tensors with a learning rate of its own."""
CORE_RATE: Final = 3.0
"""Of P and Q over LoRA's A and B. A core has r² entries where B has d·r: with one rate for both, a step of
Adam moves the map B P A by √(d/r) less, in r directions of a frozen basis. Measured: docs/experiments.md."""
GATE_RATE: Final = 3.0
"""Of the gates over LoRA's A and B: with one rate for both, a gate's weight stays at one half in a run."""


class Located(Frozen):
    """Settings with paths in them, which are relative to the file that they are written in."""

    def located(self, base: Path) -> Self:
        """The same with every relative path taken from `base`."""

        def place(value: Any) -> Any:
            if isinstance(value, Path):
                return base / value
            if isinstance(value, dict):
                return {name: place(each) for name, each in value.items()}
            return value.located(base) if isinstance(value, Located) else value

        return self.model_copy(update={name: place(getattr(self, name)) for name in self.model_fields_set})


class ModelSettings(Located):
    """Where a model comes from, and how it is loaded."""

    path: str = Field(min_length=1)
    """Folder or hub id of a causal language model, or of a vision-language model."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the folder, to be read instead of safetensors."""
    keep_layers: int | None = Field(default=None, ge=1)
    """Number of decoder layers to keep, counted from the first; all by default."""
    device: DeviceName = "auto"
    """`auto` takes CUDA, then MPS, then the processor; or `cpu`, `mps`, `cuda`, `cuda:1`."""
    dtype: DtypeName = "float32"
    """Number format of the frozen weights; `auto` takes bfloat16 where that is faster on the device."""
    quantization: Literal["nf4"] | None = None
    """Frozen linear weights in 4 bits (bitsandbytes); `dtype` is then the format of the products."""
    aligned: str | None = Field(default=None, min_length=1)
    """Folder or hub id of what `fedmosaic align` wrote for this model, where the roster names its basis."""
    rank: int | None = Field(default=None, ge=1, le=1024)
    """Rank of this client's adapter on an aligned basis; at most the federation's, which is the default."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelSettings":
        if self.quantization is not None and self.gguf_file is not None:
            raise ValueError(
                f"quantization is {self.quantization!r} and gguf_file {self.gguf_file!r}: a GGUF file is "
                "quantised already and would be quantised twice; leave one of them out"
            )
        if self.rank is not None and self.aligned is None:
            raise ValueError(
                f"rank is {self.rank} without an aligned checkpoint: bases drawn from a seed have no leading "
                "part that clients of different ranks share; name one in aligned, or leave rank out"
            )
        return self

    def located(self, base: Path) -> Self:
        """The same with absolute folders; what is no folder below `base` may be an id on a hub."""

        def place(text: str) -> str:
            folder = base / text
            return str(folder.resolve()) if folder.is_dir() else text

        aligned = self.aligned and place(self.aligned)
        return self.model_copy(update={"path": place(self.path), "aligned": aligned})


def _as_probe(settings: ModelSettings) -> ModelSettings:
    if settings.aligned is not None:
        raise ValueError(f"the probe has no adapter, so leave out aligned (it is {settings.aligned!r})")
    if settings.quantization is not None:
        raise ValueError(
            "the members' probes must be the same to the last weight, so leave out quantization "
            f"(it is {settings.quantization!r}); keep_layers or dtype = 'bfloat16' make a probe smaller"
        )
    return settings


ProbeModelSettings = Annotated[ModelSettings, AfterValidator(_as_probe)]
"""Where the probe comes from; it has no adapter."""


class HubData(Frozen):
    """A split of a data set on a hub, `hub:NAME:SPLIT` or `hub:NAME:SUBSET:SPLIT`.

    The prefix is there so that the name of a private file, mistyped, is never sent to a hub.
    """

    name: str
    subset: str | None = None
    split: str

    def __str__(self) -> str:
        return ":".join(("hub", *filter(None, (self.name, self.subset, self.split))))


_HUB: Final = re.compile(
    r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?:(?P<split>\w+(\[[\w:%+-]*\])?)"
)


def _hub_or_file(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("hub:"):
        return value
    found = _HUB.fullmatch(value)
    if found is None:
        raise ValueError("write hub:NAME:SPLIT, such as hub:owner/name:train, or hub:NAME:SUBSET:SPLIT")
    return HubData(**found.groupdict())


DataSource = Annotated[HubData | Path, BeforeValidator(_hub_or_file)]
"""A file (JSON lines, JSON, CSV, Parquet), a folder that `datasets` saved, or a split on a hub."""


class ColumnSettings(Frozen):
    """Names of the columns that examples are made of; all other columns are then left out."""

    id: str = Field(default="id", min_length=1)
    """Name of an example. Without this column, the name is a hash of the example's content."""
    prompt: str = Field(default="prompt", min_length=1)
    """What the model reads."""
    answer: str = Field(default="answer", min_length=1)
    """What the model should reply."""
    choices: str = Field(default="choices", min_length=1)
    """The closed set of answers; in CSV a list as in JSON, `["yes", "no"]`."""
    messages: str = Field(default="messages", min_length=1)
    """Instead of prompt and answer: a conversation, a list of `{"role", "content"}`."""
    person: str = Field(default="person", min_length=1)
    """The person that the record is about. With this column, the client's own statement gives the ε of the
    person with most records."""

    @model_validator(mode="after")
    def _distinct(self) -> "ColumnSettings":
        names = list(self.model_dump().values())
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column {twice[0]!r} is named for two parts of an example; name each once")
        return self


class DataSettings(Located):
    """The client's own examples, as files, folders of the `datasets` library or splits on a hub.

    `test` and `others` are only scored, never trained on, and the scores stay on this machine. Prompts name
    images in place, `<image:PATH>`.
    """

    train: DataSource | None = None
    """Examples to train on: a file, a folder, or `hub:NAME:SPLIT`. Left out only where `fedmosaic.Client` is
    handed examples."""
    ledger: Path | None = None
    """Directory of the privacy ledger of `train`; beside a file or folder by default, with `.ledger` after
    its name. Sources that share examples must name the same ledger. Data of a hub or from
    Python must always name one."""
    test: DataSource | None = None
    """Examples to score, before the first and after the last round."""
    others: dict[str, DataSource] = Field(default_factory=dict)
    """More test sets, by name."""
    columns: ColumnSettings | None = None
    """Names of the columns to read. By default the names in this table; any other column is then an error."""
    evaluation_examples: int = Field(default=0, ge=0)
    """At most this many test examples are scored per set; 0 takes all."""
    others_examples: int = Field(default=0, ge=0)
    """At most this many examples are scored per set in `others`; 0 takes all."""
    pictures: Path | None = None
    """Folder of the images that prompts name."""


class TrainingSettings(Frozen):
    """How a client trains locally; names as in ``transformers.TrainingArguments``.

    Attributes:
        learning_rate: Learning rate of LoRA's A and B, and of any other trainable tensor.
        shared_learning_rate: Learning rate of the Co-LoRA cores P and Q. By default 3 times `learning_rate`;
            under ``dp`` it is `learning_rate`, because noise moves P and Q as far as signal does.
        gate_learning_rate: Learning rate of the gates; by default 3 times `learning_rate`.
        lr_scheduler_type: `linear` lets the three rates fall from round to round, to 1/R of themselves in
            the last of R, as an option of the paper's code does; what the last round learns from own
            examples alone then outweighs less of what was received. `constant` keeps them, and so does
            `distributed-dp`, where a client trains on its own once, at the end.
        steps: Optimizer steps of one round.
        per_device_train_batch_size: Examples per forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step; private steps ignore it.
        gradient_checkpointing: Compute the layers' activations a second time on the way back, for about a
            third more time, instead of keeping them. A private step holds those of one example anyway.
        max_length: Largest number of tokens per example; longer prompts are cut from the left.
        blend_received: Share of the received adapter in the values that the local branch starts a round with.
            0, as in the paper, continues from the client's own values. Under ``dp`` both are private
            releases, so this costs no privacy.
        warmup: Optimizer steps over which the learning rates rise linearly; constant afterwards.
        weight_decay: Weight decay of AdamW, on all tensors except the gates.
        max_grad_norm: Bound on the L2 norm of an optimizer step's whole gradient; 0 for none.
        seed: Seed of dropout and of the order of the examples.
        bf16: Large matrix products in bfloat16; the adapter, its gradients and the optimizer stay in float32.
    """

    learning_rate: float = Field(default=1e-3, gt=0.0, le=10.0, allow_inf_nan=False)
    shared_learning_rate: float | None = Field(default=None, gt=0.0, le=10.0, allow_inf_nan=False)
    gate_learning_rate: float | None = Field(default=None, gt=0.0, le=10.0, allow_inf_nan=False)
    lr_scheduler_type: Literal["constant", "linear"] = "constant"
    steps: int = Field(default=100, ge=1)
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    max_length: int = Field(default=256, ge=3)
    blend_received: float = Field(default=0.0, ge=0.0, le=1.0)
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    bf16: bool = False

    def learning_rate_of(self, role: Role) -> float:
        """The learning rate of one group of tensors."""
        return {
            "adapter": self.learning_rate,
            "shared": self.shared_learning_rate or CORE_RATE * self.learning_rate,
            "gate": self.gate_learning_rate or GATE_RATE * self.learning_rate,
        }[role]

    def of_round(self, number: int, rounds: int) -> Self:
        """The same with the rates of a round, from 1, of so many."""
        if self.lr_scheduler_type == "constant":
            return self
        share = (rounds - number + 1) / rounds
        rates = {
            "learning_rate": self.learning_rate,
            "shared_learning_rate": self.shared_learning_rate,
            "gate_learning_rate": self.gate_learning_rate,
        }
        return self.model_copy(update={name: rate and share * rate for name, rate in rates.items()})

    @property
    def private_learning_rate(self) -> float:
        """The learning rate of P and Q in steps with noise."""
        return self.shared_learning_rate or self.learning_rate


IN_MEMORY: Final = ModelSettings(path="(in memory)")
"""Stands for a model that `fedmosaic.Client` is handed."""
_OF_LOADING: Final = ("gguf_file", "keep_layers", "device", "dtype", "quantization")
"""Keys of `[model]` that have no meaning for a model that is loaded already."""


class ClientSettings(Located):
    """Everything one client decides for itself. Paths are relative to the file."""

    kit: Path
    """The directory of your keys, with the certificate and roster that the consortium signed."""
    server: Address
    """Host and port of the federation's server."""
    state_dir: Path
    """Directory of all that the client keeps: adapters, keys, results. Guard it like the data."""
    model: ModelSettings = IN_MEMORY
    """The client's own model. Left out only where `fedmosaic.Client` is handed one."""
    probe: ProbeModelSettings
    """The frozen model of the task profile, the same for all members. It has no adapter, so `aligned`, `rank`
    and `quantization` do not apply."""
    projector: Path | None = None
    """Folder of a projector, with which a language model reads images; see `fedmosaic tasks projector`."""
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    threads: int | None = Field(default=None, ge=1)
    """Processor threads for the model; all by default."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """A stricter budget than the federation's; a looser one is refused."""
    unsafe_test_noise_seed: int | None = None
    """For tests only: predictable noise. The privacy statement then says that no guarantee holds."""
    compare_alone: bool = False
    """After the last round, train a second model alone, to tell what sharing adds. Doubles the time."""
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Trackers for training losses and own scores, as in `transformers`. They write into `tracking` in the
    state directory and send nothing."""
    profile_max_length: int = Field(default=96, ge=8)
    """Number of tokens per example that the task profile reads."""

    def check_complete(self, *, model: bool = False, train: bool = False, test: bool = False) -> None:
        """Refuse settings that leave something out, or name what is handed over as well.

        ConfigurationError names what is missing, or there twice; or a tracker that is not installed.
        """
        if not model and self.model == IN_MEMORY:
            raise ConfigurationError(
                "model: missing; name the model's folder or hub id in [model] path, or hand one over, "
                "Client(…, model=…, tokenizer=…)"
            )
        named = [key for key in _OF_LOADING if key in self.model.model_fields_set]
        if model and named:
            raise ConfigurationError(
                f"model.{named[0]} says how to load a model, and one is handed over that is loaded already; "
                "leave it out"
            )
        if absent := next((package for package in self.report_to if find_spec(package) is None), None):
            raise ConfigurationError(
                f"report_to names {absent!r}, whose package is not installed: pip install {absent}, or leave "
                "it out"
            )
        if not train and self.data.train is None:
            raise ConfigurationError(
                "data.train: missing; name the training examples in [data] train, or hand them over, "
                "Client(…, examples=…)"
            )
        for key, given in (("train", train), ("test", test)):
            if given and getattr(self.data, key) is not None:
                raise ConfigurationError(
                    f"data.{key} is {getattr(self.data, key)}, and examples are handed over for it as well; "
                    "leave one of them out"
                )
