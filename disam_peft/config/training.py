"""How a run trains: length, batches, optimizer, precision, validation, checkpoints, records."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from disam_peft.config.base import Config
from disam_peft.config.trackers import NoTrackerConfig, TrackerConfig


class TrainConfig(Config):
    """The training of one run."""

    steps: int = Field(default=1000, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Number of images of a step, over all processes together."""
    sampling: Literal["balanced", "proportional"] = "balanced"
    """``balanced``: each batch has equally many images of every domain. ``proportional``: as many as the domain has
    in the data, on average."""
    class_sampling: Literal["natural", "balanced"] = "natural"
    """``natural``: within a domain (``sampling: balanced``) or the data (``proportional``) a class comes as often as it
    is there. ``balanced``: all classes come equally often, so that images of rare classes are repeated, each time with
    another augmentation."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    """The highest learning rate, which is reached after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd. AdamW always has its usual coefficients, 0.9 and 0.999."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    """Number of steps in which the learning rate rises from 0 in a straight line."""
    clip_norm: float | None = Field(default=None, gt=0)
    """The gradient is scaled down to this Euclidean norm where it is larger. Unset: it is not clipped."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward passes. The trained weights stay float32."""
    deterministic: bool = False
    """Use only kernels that give the same bits each time (``torch.use_deterministic_algorithms``). On a GPU a run then
    repeats itself bit for bit, a little slower; an operation without such a kernel is an error. On a CPU nothing
    changes, because a run repeats itself there anyway."""
    compile: bool = False
    """Run transformer blocks through torch.compile in training steps: the same up to rounding, and on a GPU about 1.5
    times faster and with less memory, after some ten seconds that compiling takes."""
    gradient_checkpointing: bool = False
    """Keep only the input of each transformer block that backward goes through, and compute the block again there: the
    same gradient to the bit, much less memory, and about a third more time. (Chen et al. 2016, arXiv 1604.06174.)"""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Number of micro-batches in which each process takes its images of a step through the model: less memory, the same
    result up to rounding. ``batch_size`` stays the number of images of a step, and the variance over domains stays that
    of the whole batch. (Dropout draws other masks.) Where the image tower is frozen, only the encoding of images runs
    in micro-batches."""
    validate_every: int | None = Field(default=None, ge=1)
    """Number of steps between validations on the source domains. Unset: a tenth of the run. The last step is always
    validated."""
    save_every: int | None = Field(default=None, ge=1)
    """Number of steps between checkpoints, from which ``--resume`` goes on. Unset: one at each validation. The last
    step always has one. All are removed when the run is finished."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept. The second one is of use when the newest is damaged."""
    timeout_minutes: float = Field(default=30, gt=0)
    """How long processes wait for one that does not answer before they end with an error. It must be longer than
    anything that one process does alone, such as the first check of the data."""
    log_every: int = Field(default=10, ge=1)
    """Number of steps between records. Each record makes the device wait."""
    log_ascent_cosine: bool = False
    """Whether to record the cosine between the direction of the perturbation and that of plain SAM. It costs a third
    backward pass in the steps that are recorded."""
    workers: int | Literal["auto"] = "auto"
    """Number of processes that decode and augment images. ``auto``: chosen from the number of cores."""
    tracker: TrackerConfig = NoTrackerConfig()
    """Where numbers go besides ``metrics.jsonl``: ``none``, ``tensorboard``, ``json_lines``, ``wandb``, or such a kind
    with its settings: ``{kind: wandb, project: pacs}``."""

    @model_validator(mode="after")
    def _warmup_within_run(self) -> TrainConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than steps={self.steps}")
        return self

    @model_validator(mode="after")
    def _micro_batches_hold_images(self) -> TrainConfig:
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} cuts a step of "
                f"batch_size={self.batch_size} images into more micro-batches than it has; use at most "
                f"{self.batch_size} (batch_size is not multiplied by it)"
            )
        return self

    @property
    def validation_interval(self) -> int:
        return self.validate_every if self.validate_every is not None else max(1, self.steps // 10)
