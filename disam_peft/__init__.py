"""disam_peft: parameter-efficient CLIP fine-tuning with domain-inspired sharpness-aware minimization.

These are the public names, those that a program of yours may rely on: ``from disam_peft import DISAM, fit, load_data``.
Each is imported on first use, so that ``import disam_peft`` costs nothing. What is not listed here may move between
versions without notice.

A public name that is renamed keeps working for one minor release: it is listed in ``_RENAMED``, and its use gives a
``DeprecationWarning`` that names the new one and the version in which the old one goes.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from disam_peft.errors import did_you_mean

__version__ = "0.2.0.dev0"

# Public name -> the module that has it; ``module:name`` where it has another name there.
_HOMES = {
    # the step
    "DISAM": "disam_peft.disam.disam",
    "StepReport": "disam_peft.disam.step_report",
    # what goes wrong
    "Notice": "disam_peft.errors",
    "Stopped": "disam_peft.errors",
    "UserError": "disam_peft.errors",
    # settings
    "ClipAdapterConfig": "disam_peft.config.feature_adapters",
    "CoCoOpConfig": "disam_peft.config.prompt_adapters",
    "CoOpConfig": "disam_peft.config.prompt_adapters",
    "FullConfig": "disam_peft.config.full_adapter",
    "LastBlocks": "disam_peft.config.adapter_parts",
    "LinearProbeConfig": "disam_peft.config.feature_adapters",
    "LoraAdapterConfig": "disam_peft.config.peft_adapters",
    "PeftAdapterConfig": "disam_peft.config.peft_adapters",
    "ClapConfig": "disam_peft.config.feature_adapters",
    "ClosedFormProbeConfig": "disam_peft.config.feature_adapters",
    "LpPlusPlusConfig": "disam_peft.config.feature_adapters",
    "TaskResConfig": "disam_peft.config.feature_adapters",
    "TipAdapterConfig": "disam_peft.config.feature_adapters",
    "IvlpConfig": "disam_peft.config.prompt_adapters",
    "MapleConfig": "disam_peft.config.prompt_adapters",
    "VisualPromptsConfig": "disam_peft.config.prompt_adapters",
    "BmaConfig": "disam_peft.config.average",
    "EmaConfig": "disam_peft.config.average",
    "NoAverageConfig": "disam_peft.config.average",
    "SwaConfig": "disam_peft.config.average",
    "SwadConfig": "disam_peft.config.average",
    "BackboneConfig": "disam_peft.config.backbone",
    "AugmentConfig": "disam_peft.config.data",
    "DataConfig": "disam_peft.config.data",
    "DomainsConfig": "disam_peft.config.data",
    "FeatureConfig": "disam_peft.config.data",
    "MixupConfig": "disam_peft.config.data",
    "EvaluationConfig": "disam_peft.config.evaluation",
    "SharpnessConfig": "disam_peft.config.evaluation",
    "ContrastiveConfig": "disam_peft.config.losses",
    "CrossEntropyConfig": "disam_peft.config.losses",
    "FocalConfig": "disam_peft.config.losses",
    "MarginSoftmaxConfig": "disam_peft.config.losses",
    "SigmoidConfig": "disam_peft.config.losses",
    "MethodConfig": "disam_peft.config.method",
    "ObjectiveConfig": "disam_peft.config.objective",
    "ClassFeaturesAnchorConfig": "disam_peft.config.anchors",
    "ImageFeaturesAnchorConfig": "disam_peft.config.anchors",
    "LogitsAnchorConfig": "disam_peft.config.anchors",
    "WeightsAnchorConfig": "disam_peft.config.anchors",
    "CoralConfig": "disam_peft.config.penalties",
    "FishrConfig": "disam_peft.config.penalties",
    "GroupDROConfig": "disam_peft.config.penalties",
    "IRMConfig": "disam_peft.config.penalties",
    "MMDConfig": "disam_peft.config.penalties",
    "VRexConfig": "disam_peft.config.penalties",
    "PromptConfig": "disam_peft.config.prompts",
    "ProtocolConfig": "disam_peft.config.protocol",
    "Recipe": "disam_peft.config.recipe",
    "load_recipe": "disam_peft.config.recipe",
    "SelectionConfig": "disam_peft.config.selection",
    "ShapesConfig": "disam_peft.config.shapes",
    "TrainConfig": "disam_peft.config.training",
    # what is descended, in a loop of one's own
    "Forward": "disam_peft.disam.domain_objective",
    "Loss": "disam_peft.objectives.base",
    "Penalty": "disam_peft.objectives.base",
    "Reference": "disam_peft.objectives.base",
    "class_weights": "disam_peft.objectives.class_weights",
    "Objective": "disam_peft.objectives.objective",
    # data
    "DomainDataset": "disam_peft.data.dataset",
    "load_data": "disam_peft.data.load:load",
    "training_batches": "disam_peft.data.loading.batches",
    "make_train_loader": "disam_peft.data.loading.loader",
    "MixedBatches": "disam_peft.data.loading.mixup",
    "DomainBatches": "disam_peft.data.loading.sampler",
    "check_no_leak": "disam_peft.data.splits",
    "leave_out": "disam_peft.data.splits",
    "split_train_validation": "disam_peft.data.splits",
    "TrainTransform": "disam_peft.data.transforms.augment",
    # models
    "ClipBackbone": "disam_peft.backbones.base",
    "load_backbone": "disam_peft.backbones.families",
    "Adapter": "disam_peft.adapters.base",
    "ClassPrompts": "disam_peft.adapters.prompts",
    "build_adapter": "disam_peft.adapters.registry",
    "ClipClassifier": "disam_peft.classification.classifier",
    "zero_shot": "disam_peft.classification.classifier",
    "load_adapter": "disam_peft.classification.saved_classifier",
    "save_adapter": "disam_peft.classification.saved_classifier",
    # training
    "start_accelerator": "disam_peft.training.accelerator",
    "FitResult": "disam_peft.training.fit",
    "fit": "disam_peft.training.fit",
    # evaluation
    "metrics_by_domain": "disam_peft.evaluation.metrics",
    "Predictions": "disam_peft.evaluation.predict",
    "predict": "disam_peft.evaluation.predict",
    "validation_score": "disam_peft.evaluation.protocols",
    # export
    "export_merged": "disam_peft.export.merged",
    "export_peft": "disam_peft.export.peft",
    # a trained classifier at work
    "LoadedClassifier": "disam_peft.inference.loaded_classifier",
    "Prediction": "disam_peft.inference.prediction",
    "load_classifier": "disam_peft.inference.loaded_classifier",
    # whole runs
    "Outcome": "disam_peft.experiments.outcome",
    "train": "disam_peft.experiments.run",
    "evaluate": "disam_peft.experiments.evaluate",
    "frontier": "disam_peft.experiments.frontier",
    "build_report": "disam_peft.report.page",
    "read_runs": "disam_peft.report.runs",
}
# Old public name -> (its new name, the version in which the old name goes).
_RENAMED: dict[str, tuple[str, str]] = {}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:  # the same names, for type checkers; a test compares them with the table
    import disam_peft.data.load as _data
    from disam_peft.adapters.base import Adapter as Adapter
    from disam_peft.adapters.prompts import ClassPrompts as ClassPrompts
    from disam_peft.adapters.registry import build_adapter as build_adapter
    from disam_peft.backbones.base import ClipBackbone as ClipBackbone
    from disam_peft.backbones.families import load_backbone as load_backbone
    from disam_peft.classification.classifier import ClipClassifier as ClipClassifier
    from disam_peft.classification.classifier import zero_shot as zero_shot
    from disam_peft.classification.saved_classifier import load_adapter as load_adapter
    from disam_peft.classification.saved_classifier import save_adapter as save_adapter
    from disam_peft.config.adapter_parts import LastBlocks as LastBlocks
    from disam_peft.config.anchors import ClassFeaturesAnchorConfig as ClassFeaturesAnchorConfig
    from disam_peft.config.anchors import ImageFeaturesAnchorConfig as ImageFeaturesAnchorConfig
    from disam_peft.config.anchors import LogitsAnchorConfig as LogitsAnchorConfig
    from disam_peft.config.anchors import WeightsAnchorConfig as WeightsAnchorConfig
    from disam_peft.config.average import BmaConfig as BmaConfig
    from disam_peft.config.average import EmaConfig as EmaConfig
    from disam_peft.config.average import NoAverageConfig as NoAverageConfig
    from disam_peft.config.average import SwaConfig as SwaConfig
    from disam_peft.config.average import SwadConfig as SwadConfig
    from disam_peft.config.backbone import BackboneConfig as BackboneConfig
    from disam_peft.config.data import AugmentConfig as AugmentConfig
    from disam_peft.config.data import DataConfig as DataConfig
    from disam_peft.config.data import DomainsConfig as DomainsConfig
    from disam_peft.config.data import FeatureConfig as FeatureConfig
    from disam_peft.config.data import MixupConfig as MixupConfig
    from disam_peft.config.evaluation import EvaluationConfig as EvaluationConfig
    from disam_peft.config.evaluation import SharpnessConfig as SharpnessConfig
    from disam_peft.config.feature_adapters import ClapConfig as ClapConfig
    from disam_peft.config.feature_adapters import ClipAdapterConfig as ClipAdapterConfig
    from disam_peft.config.feature_adapters import ClosedFormProbeConfig as ClosedFormProbeConfig
    from disam_peft.config.feature_adapters import LinearProbeConfig as LinearProbeConfig
    from disam_peft.config.feature_adapters import LpPlusPlusConfig as LpPlusPlusConfig
    from disam_peft.config.feature_adapters import TaskResConfig as TaskResConfig
    from disam_peft.config.feature_adapters import TipAdapterConfig as TipAdapterConfig
    from disam_peft.config.full_adapter import FullConfig as FullConfig
    from disam_peft.config.losses import ContrastiveConfig as ContrastiveConfig
    from disam_peft.config.losses import CrossEntropyConfig as CrossEntropyConfig
    from disam_peft.config.losses import FocalConfig as FocalConfig
    from disam_peft.config.losses import MarginSoftmaxConfig as MarginSoftmaxConfig
    from disam_peft.config.losses import SigmoidConfig as SigmoidConfig
    from disam_peft.config.method import MethodConfig as MethodConfig
    from disam_peft.config.objective import ObjectiveConfig as ObjectiveConfig
    from disam_peft.config.peft_adapters import LoraAdapterConfig as LoraAdapterConfig
    from disam_peft.config.peft_adapters import PeftAdapterConfig as PeftAdapterConfig
    from disam_peft.config.penalties import CoralConfig as CoralConfig
    from disam_peft.config.penalties import FishrConfig as FishrConfig
    from disam_peft.config.penalties import GroupDROConfig as GroupDROConfig
    from disam_peft.config.penalties import IRMConfig as IRMConfig
    from disam_peft.config.penalties import MMDConfig as MMDConfig
    from disam_peft.config.penalties import VRexConfig as VRexConfig
    from disam_peft.config.prompt_adapters import CoCoOpConfig as CoCoOpConfig
    from disam_peft.config.prompt_adapters import CoOpConfig as CoOpConfig
    from disam_peft.config.prompt_adapters import IvlpConfig as IvlpConfig
    from disam_peft.config.prompt_adapters import MapleConfig as MapleConfig
    from disam_peft.config.prompt_adapters import VisualPromptsConfig as VisualPromptsConfig
    from disam_peft.config.prompts import PromptConfig as PromptConfig
    from disam_peft.config.protocol import ProtocolConfig as ProtocolConfig
    from disam_peft.config.recipe import Recipe as Recipe
    from disam_peft.config.recipe import load_recipe as load_recipe
    from disam_peft.config.selection import SelectionConfig as SelectionConfig
    from disam_peft.config.shapes import ShapesConfig as ShapesConfig
    from disam_peft.config.training import TrainConfig as TrainConfig
    from disam_peft.data.dataset import DomainDataset as DomainDataset
    from disam_peft.data.loading.batches import training_batches as training_batches
    from disam_peft.data.loading.loader import make_train_loader as make_train_loader
    from disam_peft.data.loading.mixup import MixedBatches as MixedBatches
    from disam_peft.data.loading.sampler import DomainBatches as DomainBatches
    from disam_peft.data.splits import check_no_leak as check_no_leak
    from disam_peft.data.splits import leave_out as leave_out
    from disam_peft.data.splits import split_train_validation as split_train_validation
    from disam_peft.data.transforms.augment import TrainTransform as TrainTransform
    from disam_peft.disam.disam import DISAM as DISAM
    from disam_peft.disam.domain_objective import Forward as Forward
    from disam_peft.disam.step_report import StepReport as StepReport
    from disam_peft.errors import Notice as Notice
    from disam_peft.errors import Stopped as Stopped
    from disam_peft.errors import UserError as UserError
    from disam_peft.evaluation.metrics import metrics_by_domain as metrics_by_domain
    from disam_peft.evaluation.predict import Predictions as Predictions
    from disam_peft.evaluation.predict import predict as predict
    from disam_peft.evaluation.protocols import validation_score as validation_score
    from disam_peft.experiments.evaluate import evaluate as evaluate
    from disam_peft.experiments.frontier import frontier as frontier
    from disam_peft.experiments.outcome import Outcome as Outcome
    from disam_peft.experiments.run import train as train
    from disam_peft.export.merged import export_merged as export_merged
    from disam_peft.export.peft import export_peft as export_peft
    from disam_peft.inference.loaded_classifier import LoadedClassifier as LoadedClassifier
    from disam_peft.inference.loaded_classifier import load_classifier as load_classifier
    from disam_peft.inference.prediction import Prediction as Prediction
    from disam_peft.objectives.base import Loss as Loss
    from disam_peft.objectives.base import Penalty as Penalty
    from disam_peft.objectives.base import Reference as Reference
    from disam_peft.objectives.class_weights import class_weights as class_weights
    from disam_peft.objectives.objective import Objective as Objective
    from disam_peft.report.page import build_report as build_report
    from disam_peft.report.runs import read_runs as read_runs
    from disam_peft.training.accelerator import start_accelerator as start_accelerator
    from disam_peft.training.fit import FitResult as FitResult
    from disam_peft.training.fit import fit as fit

    load_data = _data.load


if not TYPE_CHECKING:  # a type checker would otherwise take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _RENAMED:
            new, gone = _RENAMED[name]
            warnings.warn(
                f"disam_peft.{name} is now called disam_peft.{new}; the old name goes with version {gone}",
                DeprecationWarning,
                stacklevel=2,
            )
            name = new
        if name not in _HOMES:
            raise AttributeError(f"module 'disam_peft' has no attribute {name!r}{did_you_mean(name, _HOMES)}")
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
