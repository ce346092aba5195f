"""The configs of LoRA and the other tuners of the peft library. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from disam_peft.config.adapter_parts import LARGEST_OPTION, Blocks, CosineConfig, Seed

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
