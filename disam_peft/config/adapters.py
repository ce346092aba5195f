"""The configs of all adapters. Imports no torch, so that the command line can read recipes quickly."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from disam_peft.config.adapter_parts import LARGEST_OPTION, Blocks, CosineConfig, Seed
from disam_peft.config.adapter_parts import LastBlocks as LastBlocks
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import (
    ClapConfig,
    ClosedFormProbeConfig,
    LpPlusPlusConfig,
    TaskResConfig,
    TipAdapterConfig,
)
from disam_peft.config.prompt_adapters import IvlpConfig, MapleConfig, VisualPromptsConfig

Scalar = bool | int | float | str | None
PEFT_METHODS = (
    *("lora", "dora", "ia3", "oft", "loha", "lokr", "hra", "hira", "delora", "vera", "ln_tuning"),
    *("road", "miss", "shira", "waveft", "beft", "gralora", "glora", "tinylora", "boft"),
)
"""Methods of the peft library that ``kind: peft`` takes."""
MAX_RANK = 4096
"""Beyond the width of any CLIP's layers. A config from a stranger must not be able to ask for all memory."""


class _AttachedConfig(CosineConfig):
    """Where an adapter attaches to; every name must be found, nothing is matched in part."""

    towers: list[Literal["image", "text"]] = Field(default=["image"], min_length=1)
    blocks: Blocks = "all"
    """Transformer blocks of each tower: ``all``, ``{last: n}`` or a list of indices from 0."""
    seed: Seed | None = None
    """Seeds the adapter's random initialisation; unset: torch's global generator, which the run seeds."""


_OF_DATA = (
    "start from what goes through each layer on training images, which no step before the first one computes here"
)
_OTHER_STARTS = {
    "eva": f"EVA would {_OF_DATA}; use init: pissa, which starts from the weights, or kaiming",
    "corda": f"CorDA would {_OF_DATA}; use init: pissa, which starts from the weights, or kaiming",
    "lora_ga": "LoRA-GA would start from gradients of training images; use init: pissa or kaiming",
    "loftq": "LoftQ makes up for the errors of a quantised backbone; use init: kaiming",
}


class LoraAdapterConfig(_AttachedConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x + alpha / rank * B A x."""

    kind: Literal["lora"] = "lora"
    projections: list[str] = Field(default=["q", "v"], min_length=1)
    """``q k v out fc1 fc2``, or the name of a linear layer outside the blocks."""
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    alpha: float = Field(default=16.0, gt=0, le=LARGEST_OPTION)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    alpha_over: Literal["rank", "sqrt_rank"] = "rank"
    """What alpha is divided by. sqrt_rank is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), and CLIP-LoRA's scaling."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(default={})
    """Other ranks for some layers, by a projection, a block or both: ``{fc1: 4, "11": 16, "11.q": 32}``. With both
    towers a key may begin with one of them, as ``text.fc1``. The key with most parts counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=LARGEST_OPTION)]] = Field(default={})
    """The same for alpha."""
    init: Literal["kaiming", "orthogonal", "pissa", "olora"] = "kaiming"
    """kaiming: A random, B zero. orthogonal: both random, with a product of zero. pissa (Meng et al. 2024, arXiv
    2404.02948): the largest singular values and vectors of the weights; olora (Büyükakyüz 2024, arXiv 2406.01775):
    their QR decomposition. The last two train a part of the weights, and are saved as a LoRA of twice the rank for the
    unchanged backbone, as peft converts them."""
    bias: bool = False
    """Also a bias for each adapted layer, which is added to its own."""

    @property
    def keeps_start(self) -> bool:
        """Whether the factors start as a part of the weights, and what is trained is the change from there."""
        return self.init in ("pissa", "olora")

    @field_validator("init", mode="before")
    @classmethod
    def _without_training_images(cls, init: Any) -> Any:
        if isinstance(init, str) and (init in ("eva", "corda", "lora_ga", "loftq") or init.startswith("pissa_niter")):
            raise ValueError(_OTHER_STARTS.get(init, "pissa takes the exact decomposition; use init: pissa"))
        return init

    @model_validator(mode="after")
    def _a_start_that_exists(self) -> LoraAdapterConfig:
        if self.keeps_start and self.dropout:
            raise ValueError(
                f"init: {self.init} makes a part of the weights trainable, and dropout would take it out of the model "
                "at random; use dropout: 0"
            )
        if self.keeps_start and self.bias:
            raise ValueError(f"peft has no bias with init: {self.init}; use bias: false, or init: kaiming")
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init: orthogonal halves the rank, and {odd[0]} is odd; use an even rank")
        return self


class PeftAdapterConfig(_AttachedConfig):
    """Another method of the peft library, by its name and its options."""

    other_names: ClassVar[Mapping[str, str]] = {name: f"kind: peft, method: {name}" for name in PEFT_METHODS}

    kind: Literal["peft"] = "peft"
    method: str
    """``lora dora ia3 oft loha lokr hra hira delora vera road miss shira waveft beft gralora glora tinylora boft`` on
    linear layers, ``ln_tuning`` on norms."""
    projections: list[str] | None = Field(default=None, min_length=1)
    """``q k v out fc1 fc2`` for linear layers, ``norm1 norm2`` for norms, or the name of a module outside the
    blocks. Unset: q and v; k, v and fc2 for ia3; norm1 and norm2 for ln_tuning."""
    options: dict[str, Scalar] = Field(default={})
    """Fields of the method's peft config, e.g. ``{r: 8, lora_alpha: 16}``."""

    @field_validator("options", mode="before")
    @classmethod
    def _plain_values(cls, options: Any) -> Any:
        if isinstance(options, Mapping):
            plain = (bool, int, float, str, NoneType)
            lists = [str(name) for name, value in options.items() if not isinstance(value, plain)]
            if lists:
                raise ValueError(
                    f"{', '.join(lists)} cannot be set here: an option is a number, text, true or false; which modules "
                    "are adapted is said by towers, blocks and projections"
                )
            large = [
                f"{name}={str(value)[:20]}"
                for name, value in options.items()
                if isinstance(value, (int, float)) and abs(value) > (2**63 if name.endswith("_key") else LARGEST_OPTION)
            ]
            if large:
                raise ValueError(f"{', '.join(large)} is beyond {LARGEST_OPTION:g}, which no adapter works with")
        return options


class CoOpConfig(CosineConfig):
    """Learned context in the text prompt (Zhou et al. 2022, arXiv 2109.01134): [ctx_1] ... [ctx_M] class name."""

    kind: Literal["coop"] = "coop"
    context_tokens: int | None = Field(default=None, ge=1)
    """M. Unset: 16, or as many tokens as ``init`` has."""
    class_specific: bool = False
    """One context per class instead of one for all."""
    init: str | None = Field(default=None, min_length=1)
    """Words that the context starts from, e.g. ``a photo of a``. Unset: drawn from N(0, 0.02^2)."""
    seed: Seed | None = None
    """Seeds the random context; unset: torch's global generator, which the run seeds."""
    memory_budget_gb: float | None = Field(default=None, gt=0)
    """Memory (10^9 bytes) for what the prompts' forward pass keeps for backward, the model not counted. Beyond it,
    backward repeats parts of the forward pass; the gradient is the same. Unset: no limit."""


class CoCoOpConfig(CosineConfig):
    """Learned context that every image shifts (Zhou et al. 2022, arXiv 2203.05557): [ctx_1 + pi] ... [ctx_M + pi] class
    name, where a small network makes pi of the image's feature. Every image has class prompts of its own."""

    class_features_of_images: ClassVar[bool] = True
    """There are no class features without an image."""

    kind: Literal["cocoop"] = "cocoop"
    context_tokens: int | None = Field(default=None, ge=1)
    """M. Unset: 16, or as many tokens as ``init`` has."""
    class_specific: bool = False
    """One context per class instead of one for all. pi is one for all classes of an image in any case."""
    init: str | None = Field(default=None, min_length=1)
    """Words that the context starts from; published are 4 tokens, ``a photo of a``. Unset: drawn from N(0, 0.02^2)."""
    reduction: int = Field(default=16, ge=1)
    """How many times narrower the network's hidden layer is than the image features."""
    seed: Seed | None = None
    """Seeds the network and a random context; unset: torch's global generator, which the run seeds."""
    memory_budget_gb: float | None = Field(default=4.0, gt=0)
    """Memory (10^9 bytes) for what the prompts' forward pass keeps for backward, the model not counted. It grows with
    images times classes; beyond the budget they go in chunks that backward computes again, and the gradient is the
    same. ``null``: no limit."""


class LinearProbeConfig(Config):
    """A linear layer on normalised image features."""

    other_names: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("cross_modal", "cross-modal", "cross_modal_probe"), "kind: linear_probe, text_weight: 1"
    )
    has_own_head: ClassVar[bool] = True
    """Its logits come from weights of its own, not from class features."""

    kind: Literal["linear_probe"] = "linear_probe"
    init: Literal["zero_shot", "random"] = "zero_shot"
    """zero_shot: logit scale times the class features, which gives the zero-shot logits; random: N(0, 0.01^2)."""
    bias: bool = True
    text_weight: float = Field(default=0.0, ge=0, le=LARGEST_OPTION)
    """The prompts are training samples too (cross-modal adaptation, Lin et al. 2023, arXiv 2301.06267): this times the
    mean cross entropy of the head on their normalised text features, each with its class, is added to the objective. 1:
    images and texts count alike, as in the paper. 0: no texts."""
    seed: Seed | None = None
    """Seeds the random weights; unset: torch's global generator, which the run seeds."""


class ClipAdapterConfig(CosineConfig):
    """A bottleneck behind the image tower, blended with the frozen features (Gao et al. 2021, arXiv 2110.04544)."""

    kind: Literal["clip_adapter"] = "clip_adapter"
    reduction: int = Field(default=4, ge=1)
    """How many times narrower the hidden layer is than the features."""
    ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of the adapted feature in the blend; 1 - ratio is the share of the frozen one."""
    seed: Seed | None = None
    """Seeds the initial weights; unset: torch's global generator, which the run seeds."""


def _blocks_of_a_word(value: Any) -> Any:
    return {True: "all", False: "none"}[value] if isinstance(value, bool) else value


SomeBlocks = Annotated[Literal["none"] | Blocks, BeforeValidator(_blocks_of_a_word)]
"""Blocks, or none of them; true and false mean ``all`` and ``none``."""


class FullConfig(CosineConfig):
    """The weights of the towers themselves are trained, all of them or a part. With the defaults it is the whole image
    tower, as in CLIPOOD (Shu et al. 2023, arXiv 2302.00864).

    What the settings choose is trained together: ``{blocks: {last: 2}, norms: all}`` trains two blocks whole and the
    norms of all others. A final norm counts as a part of the last block. The biases of the keys are never trained,
    because they cannot change any output: they add the same number to every score of a query.
    """

    other_names: ClassVar[Mapping[str, str]] = {
        "clipood": "kind: full",
        "bitfit": "kind: full, blocks: none, biases: all",
    }

    kind: Literal["full"] = "full"
    towers: list[Literal["image", "text"]] = Field(default=["image"], min_length=1)
    blocks: SomeBlocks = "all"
    """Transformer blocks that are trained whole: ``all``, ``{last: n}``, a list of indices from 0, or ``none``."""
    norms: SomeBlocks = "none"
    """Blocks whose norms are trained; ``all`` includes the norm before the blocks. ``{blocks: none, norms: all}`` is
    LN-tuning (arXiv 2312.11420)."""
    biases: SomeBlocks = "none"
    """Blocks whose biases are trained, those of their norms included. ``{blocks: none, biases: all}`` is BitFit (Ben
    Zaken et al. 2021, arXiv 2106.10199)."""
    projection: bool | None = None
    """The projection into the shared space. Unset: trained with ``blocks: all``."""
    stem: bool | None = None
    """What comes before the blocks: patch embedding, class token, positions, norm. Unset: trained with ``blocks: all``.
    Nothing of the tower is frozen then, so that ``features.store`` has nothing to keep."""
    token_embedding: bool = False
    """Also the embedding of the text tower's tokens. Only the few tokens of the prompts learn anything, and weight
    decay pulls all others towards zero."""

    @model_validator(mode="after")
    def _trains_something(self) -> FullConfig:
        if self.token_embedding and "text" not in self.towers:
            raise ValueError("token_embedding is of the text tower; add text to towers, or leave it out")
        in_blocks = [some for some in (self.blocks, self.norms, self.biases) if some != "none"]
        if not in_blocks and not (self.projection or self.stem or self.token_embedding):
            raise ValueError(
                "nothing would be trained: blocks, norms and biases are none, and projection and stem are not set; "
                "choose blocks: all for the whole tower, or norms: all"
            )
        return self


class ProbeStartConfig(Config):
    """The linear probe that LP-FT begins with: multinomial logistic regression on the normalised features of the
    training images, as they are in evaluation. It minimises the mean cross entropy plus ``weight_decay / 2`` times the
    squared distance of the weights from where they start, with L-BFGS on all images at once; it has no learning rate.
    """

    init: Literal["zero_shot", "zeros"] = "zero_shot"
    """zero_shot: it starts from, and ``weight_decay`` pulls it to, the zero-shot head; zeros: to nothing, as usual."""
    bias: bool = True
    weight_decay: float = Field(default=1e-3, ge=0)
    """0: no penalty. Classes that the features tell apart then have no minimum, and ``steps`` decides."""
    steps: int = Field(default=200, ge=1)
    """At most so many; it ends when it has come to the minimum."""


def _below_a_head(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if kind in ("coop", "cocoop", "ivlp", "maple"):
        raise ValueError(f"{kind} trains prompts, and with a head of its own the text has no part in the logits")
    if kind in ("task_res", "clap"):
        raise ValueError(f"{kind} trains class features, which have no part in the logits of a head of its own")
    if kind in ("linear_probe", "lp_ft", "tip_adapter", "closed_form_probe", "lp_plus_plus"):
        raise ValueError(
            f"{kind} has a head of its own, and lp_ft has one already; choose lora, peft, full or clip_adapter"
        )
    return value


class LpFtConfig(Config):
    """LP-FT: a linear probe first, then an adapter of the image tower from it, head and adapter together (Kumar et al.
    2022, arXiv 2202.10054)."""

    has_own_head: ClassVar[bool] = True
    other_names: ClassVar[Mapping[str, str]] = {"lp-ft": "kind: lp_ft", "lpft": "kind: lp_ft"}

    kind: Literal["lp_ft"] = "lp_ft"
    probe: ProbeStartConfig = ProbeStartConfig()
    """The first stage, before the first step."""
    adapter: Annotated[
        Annotated[LoraAdapterConfig | PeftAdapterConfig | FullConfig | ClipAdapterConfig, Field(discriminator="kind")],
        BeforeValidator(_below_a_head),
    ] = LoraAdapterConfig()
    """What the steps train together with the head: ``lora``, ``peft``, ``full`` or ``clip_adapter``."""

    @model_validator(mode="after")
    def _of_the_image_side(self) -> LpFtConfig:
        if "text" in getattr(self.adapter, "towers", []):
            raise ValueError(
                "adapter.towers has text, but with a head of its own the text has no part in the logits; use "
                "towers: [image]"
            )
        if self.adapter.logit_scale == "trained":
            raise ValueError("adapter.logit_scale is trained, but the head has no logit scale; leave it out")
        return self


_HOW_TO_COMBINE = (
    "choose at most one of lora, peft, full and visual_prompts, clip_adapter, and one of coop, task_res, linear_probe"
)


def _that_combines(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if kind in ADAPTER_KINDS and kind not in CombinedConfig.places:
        raise ValueError(f"{kind} stands alone, and cannot be a part of a combination; {_HOW_TO_COMBINE}")
    return value


class CombinedConfig(Config):
    """Several adapters at once, each at a place of its own: in the towers, behind the image tower, and on the side of
    the classes. A list is short for it: ``adapter: [{kind: lora}, {kind: coop}]``."""

    places: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("lora", "peft", "full", "visual_prompts"), "the towers"),
        "clip_adapter": "the features behind the image tower",
        **dict.fromkeys(("coop", "task_res", "linear_probe"), "the classes"),
    }
    """Kind of a part -> what it changes."""

    kind: Literal["combined"] = "combined"
    parts: Annotated[
        list[
            Annotated[
                Annotated[
                    LoraAdapterConfig
                    | PeftAdapterConfig
                    | FullConfig
                    | VisualPromptsConfig
                    | ClipAdapterConfig
                    | CoOpConfig
                    | TaskResConfig
                    | LinearProbeConfig,
                    Field(discriminator="kind"),
                ],
                BeforeValidator(_that_combines),
            ]
        ],
        Field(min_length=2),
    ]
    """They are trained together, from the first step on, in one forward pass."""

    @property
    def has_own_head(self) -> bool:
        return any(isinstance(part, LinearProbeConfig) for part in self.parts)

    @model_validator(mode="after")
    def _fit_together(self) -> CombinedConfig:
        taken: dict[str, str] = {}
        for part in self.parts:
            place = self.places[part.kind]
            if place in taken:
                raise ValueError(f"{taken[place]} and {part.kind} both change {place}; {_HOW_TO_COMBINE}")
            taken[place] = part.kind
            if getattr(part, "logit_scale", "frozen") == "trained":
                raise ValueError(
                    f"{part.kind} has logit_scale: trained, which a combination cannot train; leave it out"
                )
        if any("text" in getattr(part, "towers", []) for part in self.parts):
            self._require_text_to_matter()
        return self

    def _require_text_to_matter(self) -> None:
        for part in self.parts:
            if isinstance(part, LinearProbeConfig):
                raise ValueError(
                    "towers has text, but with a linear_probe the text has no part in the logits; use towers: [image]"
                )
            if isinstance(part, TaskResConfig):
                raise ValueError(
                    "towers has text, but task_res adds to the class features of a frozen text tower; use "
                    "towers: [image]"
                )
            if isinstance(part, CoOpConfig) and part.memory_budget_gb is not None:
                raise ValueError(
                    "memory_budget_gb of coop counts what a frozen text tower keeps, and towers has text; leave it out"
                )


def _combination_of_a_list(value: Any) -> Any:
    return {"kind": "combined", "parts": value} if isinstance(value, list) else value


AdapterConfig = Annotated[
    LoraAdapterConfig
    | PeftAdapterConfig
    | CoOpConfig
    | LinearProbeConfig
    | ClipAdapterConfig
    | FullConfig
    | LpFtConfig
    | TaskResConfig
    | TipAdapterConfig
    | ClosedFormProbeConfig
    | LpPlusPlusConfig
    | VisualPromptsConfig
    | IvlpConfig
    | MapleConfig
    | ClapConfig
    | CoCoOpConfig
    | CombinedConfig,
    Field(discriminator="kind"),
    BeforeValidator(_combination_of_a_list),
]
"""The list of all adapters: recipes, ``compare --adapters``, the registry and the tests read it."""

ADAPTER_CONFIGS: tuple[type[Config], ...] = get_args(get_args(AdapterConfig)[0])
ADAPTER_KINDS: tuple[str, ...] = tuple(config.model_fields["kind"].default for config in ADAPTER_CONFIGS)
"""What ``adapter.kind`` may be in a recipe."""


def adapter_label(adapter: Config) -> str:
    """The kind of an adapter, as tables and sentences call it; of a combination those of its parts: ``lora + coop``."""
    parts = adapter.parts if isinstance(adapter, CombinedConfig) else [adapter]
    return " + ".join(getattr(part, "kind", "") for part in parts)


def export_format(adapter: Config) -> Literal["peft", "merged"]:
    """What ``export --to`` writes such an adapter as, where it cannot be both: peft has no format for whole weights."""
    return "merged" if isinstance(adapter, FullConfig) else "peft"
