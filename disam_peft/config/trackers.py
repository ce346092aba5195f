"""Where the numbers of training go besides ``metrics.jsonl``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from disam_peft.config.base import Config, with_kind


class NoTrackerConfig(Config):
    """Nowhere else."""

    kind: Literal["none"] = "none"


class TensorBoardConfig(Config):
    """Event files for TensorBoard, in the folder ``tensorboard`` beside the folders of the runs."""

    kind: Literal["tensorboard"] = "tensorboard"


class JsonLinesConfig(Config):
    """One line of JSON per record, in ``tracking.jsonl`` in the folder of the run."""

    kind: Literal["json_lines"] = "json_lines"


class WandbConfig(Config):
    """Weights & Biases without a network: an offline run in the folder ``wandb`` beside the folders of the runs.
    ``wandb sync`` uploads it, whenever you like."""

    kind: Literal["wandb"] = "wandb"
    project: str = Field(default="disam_peft", min_length=1)
    """The project that the runs belong to after an upload."""


TrackerConfig = Annotated[
    NoTrackerConfig | TensorBoardConfig | JsonLinesConfig | WandbConfig,
    Field(discriminator="kind"),
    BeforeValidator(with_kind),
]
