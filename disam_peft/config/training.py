"""What one run of training is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from disam_peft.config.base import Config
from disam_peft.config.trackers import NoTrackerConfig, TrackerConfig


class TrainConfig(Config):
    """How long, how fast, on what."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Images of a step, over all processes."""
    sampling: Literal["balanced", "proportional"] = "balanced"
    """``balanced``: as many images of every domain in each batch."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate, reached after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD; AdamW keeps its usual 0.9 and 0.999."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; unset: not clipped."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward passes; what is trained stays float32."""
    compile: bool = False
    """Run transformer blocks through torch.compile in training steps: the same up to rounding, and on a GPU about 1.5
    times faster and with less memory, after some ten seconds that compiling takes."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Number of micro-batches in which each process takes its images of a step through the model: less memory, the same
    result up to rounding. ``batch_size`` stays the number of images of a step, and the variance over domains stays that
    of the whole batch. (Dropout draws other masks.) Where the image tower is frozen, only the encoding of images runs
    in micro-batches."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations on the sources; unset: ten times a run. The last step is always validated."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, from which ``--resume`` goes on; unset: one at each validation. The last step always
    has one. They are removed when the run is finished."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many stay, the newest: a second one is there for the day on which the first is damaged."""
    timeout_minutes: float = Field(default=30, gt=0)
    """How long processes wait for one that does not answer, before they end with an error. It must be longer than
    anything that one process does alone, such as the first check of the data."""
    log_every: int = Field(default=10, ge=1)
    """Steps between records; reading the numbers makes the device wait."""
    log_ascent_cosine: bool = False
    """Record the cosine between the ascent direction and plain SAM's; costs a third backward."""
    workers: int | Literal["auto"] = "auto"
    """Processes that decode and augment images."""
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
