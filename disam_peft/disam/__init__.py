"""Domain-inspired sharpness-aware minimization (Zhang et al., ICLR 2024, arXiv 2405.18861). Needs torch alone.

Read ``disam.py`` first: it is the step in order; ``ascent.py`` has the closed form that makes it one backward, and
``descent.py`` what GSAM and SAGM make of both gradients.
"""

from disam_peft.disam.ascent import ascent_weights, entropic_weights
from disam_peft.disam.descent import gsam_gradient, sagm_gradient
from disam_peft.disam.disam import DISAM
from disam_peft.disam.domain_objective import DomainObjective, DomainsOfSamples, Forward
from disam_peft.disam.domain_sums import DomainSums, domain_sums
from disam_peft.disam.perturbation import perturbations, restored
from disam_peft.disam.step_report import StepReport

__all__ = [
    "DISAM",
    "DomainObjective",
    "DomainSums",
    "DomainsOfSamples",
    "Forward",
    "StepReport",
    "ascent_weights",
    "domain_sums",
    "entropic_weights",
    "gsam_gradient",
    "perturbations",
    "restored",
    "sagm_gradient",
]
