"""Config class -> adapter class. The configs in the union of ``config/adapters.py`` are the list of names."""

from __future__ import annotations

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.clap import ClapAdapter
from disam_peft.adapters.clip_adapter import ClipAdapter
from disam_peft.adapters.closed_form_probe import ClosedFormProbe
from disam_peft.adapters.combined import CombinedAdapter
from disam_peft.adapters.coop.cocoop_adapter import CoCoOpAdapter
from disam_peft.adapters.coop.coop_adapter import CoOpAdapter
from disam_peft.adapters.effect import require_effect
from disam_peft.adapters.full import FullAdapter
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.lp_ft import LpFtAdapter
from disam_peft.adapters.lp_plus_plus import LpPlusPlusAdapter
from disam_peft.adapters.peft.lora_adapter import LoraAdapter
from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.prompts import ClassPrompts, fill_templates
from disam_peft.adapters.quantised import require_possible
from disam_peft.adapters.task_res import TaskResAdapter
from disam_peft.adapters.tip_adapter import TipAdapter
from disam_peft.adapters.tower_prompts.ivlp import IvlpAdapter
from disam_peft.adapters.tower_prompts.maple import MapleAdapter
from disam_peft.adapters.tower_prompts.visual_prompts import VisualPromptsAdapter
from disam_peft.adapters.trained_scale import TrainedScale
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import CombinedConfig, LpFtConfig
from disam_peft.config.feature_adapters import (
    ClapConfig,
    ClipAdapterConfig,
    ClosedFormProbeConfig,
    LinearProbeConfig,
    LpPlusPlusConfig,
    TaskResConfig,
    TipAdapterConfig,
    takes_no_steps,
)
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoCoOpConfig, CoOpConfig, IvlpConfig, MapleConfig, VisualPromptsConfig
from disam_peft.errors import UserError

ADAPTERS: dict[type[Config], type[Adapter]] = {
    LoraAdapterConfig: LoraAdapter,
    PeftAdapterConfig: PeftAdapter,
    CoOpConfig: CoOpAdapter,
    LinearProbeConfig: LinearProbeAdapter,
    ClipAdapterConfig: ClipAdapter,
    FullConfig: FullAdapter,
    LpFtConfig: LpFtAdapter,
    TaskResConfig: TaskResAdapter,
    TipAdapterConfig: TipAdapter,
    ClosedFormProbeConfig: ClosedFormProbe,
    LpPlusPlusConfig: LpPlusPlusAdapter,
    VisualPromptsConfig: VisualPromptsAdapter,
    IvlpConfig: IvlpAdapter,
    MapleConfig: MapleAdapter,
    ClapConfig: ClapAdapter,
    CoCoOpConfig: CoCoOpAdapter,
    CombinedConfig: CombinedAdapter,
}


def build_adapter(
    config: AdapterConfig, backbone: ClipBackbone, prompts: ClassPrompts, *, to_train: bool = True
) -> Adapter:
    """Build the adapter of a config on a backbone, for these classes. On an error the backbone is left as it was.

    Args:
        to_train: whether it will be trained. A saved one is built without the pass that finds weights without effect.

    Raises:
        UserError: the backbone already carries an adapter, the config asks for something that the backbone does not
            have, a prompt cannot be used, nothing would be trained, or weights that cannot change any feature would.
    """
    fill_templates(prompts)
    _require_plain(backbone)
    require_possible(config, backbone)
    adapter = ADAPTERS[type(config)].build(config, backbone, prompts)
    if getattr(config, "logit_scale", "frozen") == "trained":
        adapter.trained_scale = TrainedScale(backbone)
    if not (adapter.trainable() or takes_no_steps(config)):
        adapter.detach(backbone)
        raise UserError(f"adapter '{config.kind}' has no trainable parameter with {config!r}; change its config")
    if to_train:
        try:
            require_effect(adapter, backbone)
        except BaseException:
            adapter.detach(backbone)
            raise
    return adapter


def planned_image_split(config: AdapterConfig, backbone: ClipBackbone) -> int | None:
    """The ``image_split`` of the adapter that ``build_adapter`` would build; builds nothing.

    Raises:
        UserError: the backbone already carries an adapter, or the config asks for modules that it does not have.
    """
    _require_plain(backbone)
    return ADAPTERS[type(config)].planned_image_split(config, backbone)


def _require_plain(backbone: ClipBackbone) -> None:
    if {name for name, _ in backbone.model.named_parameters()} != backbone.base_parameters().keys():
        raise UserError(
            f"backbone {backbone.config.name} already carries an adapter; call its detach(backbone) first, or load "
            "the backbone again"
        )
