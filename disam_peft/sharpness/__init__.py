"""Domain-inspired sharpness-aware minimization (Zhang et al., ICLR 2024, arXiv 2405.18861). Needs torch alone."""

from disam_peft.sharpness.domains import DomainSums, ascent_weights, domain_sums
from disam_peft.sharpness.perturbation import restored
from disam_peft.sharpness.report import StepReport
from disam_peft.sharpness.step import DISAM

__all__ = ["DISAM", "DomainSums", "StepReport", "ascent_weights", "domain_sums", "restored"]
