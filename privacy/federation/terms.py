"""The terms of a federation: what all members agree on, and the consortium signs with the roster."""

import hashlib
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedmosaic.privacy.configuration import Frozen, canonical_json
from fedmosaic.privacy.encryption.parameters import CkksParameters, Parameters
from fedmosaic.privacy.federation.names import Family
from fedmosaic.privacy.groupkey.agreement import MINIMUM_MEMBERS
from fedmosaic.privacy.ledger.rows import Unit
from fedmosaic.privacy.mechanism.profile import ProfileMechanism
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos import bounds

Protection = Literal["none", "encrypted", "dp", "dp+encrypted", "distributed-dp"]
"""How the shared adapter is protected; see `AdapterTerms.protection`."""

Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]

_LARGEST_PLANNED_EPSILON = 100.0
"""`fedmosaic.privacy.accounting.calibrate` finds no noise for more."""

DEFAULT_TARGET_MODULES = (
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
"""All linear layers of a Llama or Qwen2 decoder block, as in the authors' released code."""


class AdapterTerms(Frozen):
    """What every client shares: the shape of P and Q, and how they are protected on their way.

    `protection` decides who can read the shared adapter: `none` (everybody who handles it),
    `encrypted` (members only, as a weighted sum), `dp` (everybody, but as a differentially private
    release), `dp+encrypted` (both), `distributed-dp` (nobody but through sums of a group, which are
    differentially private releases; see `GroupSumTerms`).
    """

    rank: int = Field(default=16, ge=1, le=1024)
    """r: a core P is r × r, Q has r values."""
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """α of the adapter's scale s = α/r."""
    blocks: int = Field(default=4, ge=1, le=256)
    """Decoder layers whose cores are shared, the same number in every architecture."""
    layer_rule: Literal["relative_depth", "authors", "first", "late"] = "relative_depth"
    """How they are chosen: at equal relative depth, by the rule of the authors' code, the first or the last
    ones (`late`)."""
    target_modules: tuple[str, ...] = Field(default=DEFAULT_TARGET_MODULES, min_length=1)
    """Linear modules within a decoder layer that carry the adapter, by name."""
    other_layers: Literal["lora", "none"] = "lora"
    """What all other layers carry: the client's own LoRA, or nothing."""
    gate: Literal["scalar"] = "scalar"
    """Weight β of the global branch: one learnt number per module."""
    basis_seed: int = Field(default=0, ge=0)
    """Seed of the frozen bases A, B, the same for all members, where there is no aligned basis."""
    basis: str = Field(default="", pattern=r"^(aligned:[0-9a-f]{32})?$")
    """Name of the aligned basis in all clients' checkpoints; empty for one drawn from `basis_seed`."""
    family_dimensions: dict[Family, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Family sharing: model families that also share the LoRA of their other layers, and the length of that
    vector: rank × the sum of inputs and outputs of the target modules in layers without cores. A wrong length
    is refused by `fedmosaic doctor`, which names the right one."""
    protection: Protection = "encrypted"
    """Who can read what is shared. `dp` and `none` also need `encryption.backend = "plain"` and
    `allow_plaintext = true`."""

    @property
    def shared_dimensions(self) -> int:
        """Length d of the shared adapter vector: blocks · modules · (rank² + rank)."""
        return self.blocks * len(self.target_modules) * (self.rank**2 + self.rank)

    @property
    def spec_hash(self) -> bytes:
        """SHA-256 (32 bytes) of the shared layout, which every client's model must give as well.

        It differs wherever averaging would be meaningless.
        """
        layout = {
            "format": "fedmosaic/shared-adapter/1",
            "rank": self.rank,
            "alpha": float(self.alpha),
            "blocks": self.blocks,
            "modules": sorted(self.target_modules),
            "basis": self.basis_name,
        }
        return hashlib.sha256(canonical_json(layout).encode()).digest()

    @property
    def basis_name(self) -> str:
        """Name of the frozen basis A, B, as it goes into the layout's hash."""
        return self.basis or f"seed:{self.basis_seed}"

    @property
    def encrypted(self) -> bool:
        """Whether uploads are encrypted before they leave the client."""
        return self.protection in ("encrypted", "dp+encrypted")

    @property
    def private(self) -> bool:
        """Whether the shared branch is trained with differential privacy."""
        return self.protection in ("dp", "dp+encrypted", "distributed-dp")

    @property
    def in_group_sums(self) -> bool:
        """Whether members share one noisy step per round in sums of their groups, and no adapter."""
        return self.protection == "distributed-dp"


class AdapterPrivacyTerms(Frozen):
    """DP-SGD on P and Q. All of it is public and fixed before any private data is seen.

    `target_epsilon` is each client's budget, both channels together. The noise multiplier follows from it,
    from the schedule and from the client's own number of examples. `expected_batch_size` is the divisor of
    the noisy sum and, over the number of examples, the Poisson sampling rate.
    """

    target_epsilon: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    """ε of each client's budget for all that is released from its data, task profile and adapter together.
    Without DP on the adapter it bounds the profile alone. A client may choose a smaller one."""
    largest_delta: float | None = Field(default=None, gt=1e-12, le=1.0)
    """δ of a client of n examples is the smaller of n^-1.1 and this. Left out, founding writes 1e-5; 1 leaves
    n^-1.1 alone, which is weak for few examples (1.4e-3 for 400)."""
    clipping_norm: float = Field(default=1.0, gt=1e-6, le=1e6, allow_inf_nan=False)
    """C: bound on the L2 norm of one example's gradient in P and Q."""
    expected_batch_size: int = Field(default=32, ge=1)
    """Mean number of examples in a Poisson sample. Divided by the client's number of examples, it is the
    sampling rate q."""
    steps_per_round: int = Field(default=20, ge=1)
    """Private steps of a round. More steps need more noise."""


class GroupSumTerms(Frozen):
    """Sums of groups under `adapter.protection = "distributed-dp"`.

    Each member adds noise s = σ/√(minimum_contributors − colluders) to its part of a sum, so the noise of a
    group protects every member of it, as long as no more than `colluders` of them help the server.
    """

    groups: int = Field(default=1, ge=1, le=64)
    """Groups of members with like task profiles, at most."""
    minimum_contributors: int = Field(default=6, ge=3)
    """Members without whom a sum is not formed; noise is planned for so many."""
    colluders: int = Field(default=1, ge=1)
    """Members of a group, drawn for a round or not, that may work together with the server."""
    unit: Unit = "example"
    """What the privacy guarantee is for: one example, or all examples of a `person` (a column of the data).
    With `person`, n, q and batch sizes count persons, whose gradients are added up before clipping."""
    least_examples: int = Field(default=100, ge=1)
    """Examples, or persons, that a member needs to contribute; noise is planned for its q and δ."""
    noise_multiplier: float | None = Field(default=None, gt=0.0, le=1e6, allow_inf_nan=False)
    """σ of a sum against `colluders` members and the server; planned at founding if left out."""
    learning_rate: float = Field(default=0.015, gt=0.0, le=10.0, allow_inf_nan=False)
    """Of the public steps on P and Q, falling to 0 over the rounds."""
    bits: int = Field(default=32, ge=16, le=62)
    """Of the integers that are added."""

    @model_validator(mode="after")
    def _consistent(self) -> "GroupSumTerms":
        if 3 * self.colluders > self.minimum_contributors:
            raise ValueError(
                f"group_sums.colluders is {self.colluders} of at least {self.minimum_contributors} "
                f"contributors; at most a third may be, here {self.minimum_contributors // 3}"
            )
        return self


class RelevanceTerms(Frozen):
    """How the server turns task profiles into weights (paper, RELA)."""

    similarity: Literal["corrected", "cosine"] = "corrected"
    """How alike two profiles are: the cosine, `corrected` for the noise in the norms."""
    temperature: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """τ of the softmax over similarities; a small τ favours the most similar client."""
    average_decay: float = Field(default=0.5, ge=0, lt=1)
    """Weight of earlier releases in a profile's moving average."""
    across_families: bool = False
    """Whether members receive from other families than their own. What one model learnt was shown to help
    another only if both compute nearly the same; `fedmosaic align evaluate` measures it for yours."""


class ScheduleTerms(Frozen):
    """Number of rounds, and how long server and clients wait."""

    rounds: int = Field(default=3, ge=1, le=100_000)
    """Number of rounds; a run of R rounds has R - 1 exchanges."""
    quorum: int = Field(default=4, ge=1)
    """Smallest number of uploads with which a round closes at its deadline."""
    round_deadline_seconds: Seconds = 3600
    """Time from the opening of a round to its deadline."""
    gathering_seconds: Seconds = 600
    """How long a step of the key agreement waits for a member."""
    key_patience_seconds: Seconds = 120
    """How long a client waits for a message of the key agreement."""
    rotate_key_every: int = Field(default=50, ge=1)
    """Rounds after which a new group key is agreed on."""
    sampled_clients: int | None = Field(default=None, ge=2, le=bounds.MAX_CONTRIBUTORS)
    """K, the members that take part in a round; all of them if left out. They take turns by a public rule, so
    that of n members none takes part twice within ⌊n/K⌋ rounds, and noise is planned for so many turns. On
    the group key of encrypted adapters all members agree, drawn or not."""

    def share(self, group: int, members: int) -> int:
        """How many of a group of so many of the members take part in a round: ⌊K·n_r/N⌋, or all."""
        return group if self.sampled_clients is None else self.sampled_clients * group // members

    def turns(self, members: int) -> int:
        """Rounds in which one of so many members takes part, at most; see `roster.taking_part`."""
        return -(-self.rounds // max(1, members // (self.sampled_clients or members)))


class CommonTerms(Frozen):
    """What a roster and a scenario both say: all terms but the task profile, which is fitted in between."""

    adapter: AdapterTerms = AdapterTerms()
    adapter_privacy: AdapterPrivacyTerms = AdapterPrivacyTerms()
    group_sums: GroupSumTerms = GroupSumTerms()
    policy: AggregationPolicy = AggregationPolicy()
    relevance: RelevanceTerms = RelevanceTerms()
    schedule: ScheduleTerms = ScheduleTerms()
    encryption: Annotated[Parameters, Field(discriminator="backend")] = CkksParameters()
    allow_plaintext: bool = False
    """Must be `true` if nothing is encrypted (`encryption.backend = "plain"`)."""

    def least_group(self, members: int) -> int:
        """Members that each group of so many needs, so that enough of it for a sum take part in a round."""
        least, sampled = self.group_sums.minimum_contributors, self.schedule.sampled_clients
        return least if sampled is None else -(-least * members // sampled)

    def private_steps(self, members: int) -> int:
        """Steps of DP-SGD that each of so many members plans its noise for: all that it will ever take."""
        return self.adapter_privacy.steps_per_round * self.schedule.turns(members)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        plain = self.encryption.backend == "plain"
        if self.adapter.encrypted and plain:
            raise ValueError(
                f"adapter.protection is {self.adapter.protection!r} but encryption.backend is 'plain'; "
                "choose 'ckks' or 'mask', or adapter.protection 'none' or 'dp'"
            )
        if not self.adapter.encrypted and not plain:
            also = "" if self.adapter.in_group_sums else " and allow_plaintext = true"
            raise ValueError(
                f"adapter.protection is {self.adapter.protection!r}, so nothing is encrypted: say so with "
                f"encryption.backend = 'plain'{also}"
            )
        if plain and not self.allow_plaintext and not self.adapter.in_group_sums:
            raise ValueError("encryption.backend 'plain' needs allow_plaintext = true")
        if self.adapter.private and self.adapter.family_dimensions:
            raise ValueError(
                "adapter.family_dimensions shares LoRA that is not trained with differential privacy; with "
                f"adapter.protection {self.adapter.protection!r} leave it out"
            )
        self._check_sampling()
        if self.adapter.in_group_sums:
            self._check_group_sums()
        epsilon = self.adapter_privacy.target_epsilon
        if self.adapter.private and epsilon > _LARGEST_PLANNED_EPSILON:
            raise ValueError(
                f"adapter_privacy.target_epsilon is {epsilon:g}; noise is planned for at most "
                f"{_LARGEST_PLANNED_EPSILON:g}, and more protects nothing"
            )
        return self

    def _check_sampling(self) -> None:
        sampled = self.schedule.sampled_clients
        if sampled is None:
            return
        if self.adapter.in_group_sums:
            # Shares of K are rounded down, so that a round may have one member less for every further group.
            groups, fewest = self.group_sums.groups, self.group_sums.minimum_contributors
            least = max(groups * fewest, self.schedule.quorum + groups - 1)
            if sampled < least:
                raise ValueError(
                    f"schedule.sampled_clients is {sampled}; {groups} groups with sums of at least {fewest} "
                    f"and a quorum of {self.schedule.quorum} take at least {least}; or take fewer groups"
                )
            return
        holders = MINIMUM_MEMBERS if self.adapter.encrypted else 0  # those of the last round have a key too
        least = max(self.schedule.quorum, self.policy.fewest_contributors + 1, holders)
        if sampled < least:
            key = f", a group key has {holders} holders" if holders else ""
            raise ValueError(
                f"schedule.sampled_clients is {sampled}; the quorum is {self.schedule.quorum} and the policy "
                f"asks for {self.policy.fewest_contributors} other contributors{key}: take at least {least}"
            )

    def _check_group_sums(self) -> None:
        if self.adapter_privacy.steps_per_round != 1:
            raise ValueError(
                f"adapter_privacy.steps_per_round is {self.adapter_privacy.steps_per_round}; with "
                "adapter.protection 'distributed-dp' a round is one step, so write 1 and more schedule.rounds"
            )
        size = -(-self.adapter.shared_dimensions * self.group_sums.bits // 8)
        if size > bounds.MAX_CHUNK_BYTES:
            raise ValueError(
                f"a sum has {size:,} bytes, at most {bounds.MAX_CHUNK_BYTES:,} can be sent; lower "
                "adapter.rank"
            )


class Terms(CommonTerms):
    """Everything the members agree on before the first round."""

    profile: ProfileMechanism

    @property
    def unit(self) -> Unit:
        """What one unit of the privacy guarantee is, for task profile and adapter alike."""
        return self.group_sums.unit if self.adapter.in_group_sums else "example"

    @model_validator(mode="after")
    def _profile_fits(self) -> Self:
        if self.profile.dimensions > bounds.MAX_PROFILE_DIMENSIONS:
            raise ValueError(
                f"the task profile has {self.profile.dimensions} values, at most "
                f"{bounds.MAX_PROFILE_DIMENSIONS} can be sent; reduce it to fewer"
            )
        return self


def check_witnessed(terms: Terms) -> None:
    """ValueError where a witness could not recompute the aggregates of these terms bit for bit."""
    if terms.encryption.backend == "plain":
        raise ValueError(
            "encryption.backend is 'plain', whose sums no witness can recompute bit for bit; choose "
            "another, or no witness"
        )
