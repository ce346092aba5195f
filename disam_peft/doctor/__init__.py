"""Does the step do here, on this machine, backbone and adapter, what it promises? Small checks, each on its own."""

from disam_peft.doctor.examine import Examination, demo_recipe, examine
from disam_peft.doctor.finding import Finding
from disam_peft.doctor.subject import Subject, build_subject

__all__ = ["Examination", "Finding", "Subject", "build_subject", "demo_recipe", "examine"]
