"""Write the adapter of a finished run in a form that other software reads."""

from __future__ import annotations

from pathlib import Path

from disam_peft.adapters.interpolation import require_alpha
from disam_peft.adapters.manifest import read_manifest
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.backbone import Precision
from disam_peft.config.export import RANK, check_form
from disam_peft.errors import UserError
from disam_peft.experiments.evaluate import put_at, require_zero_shot_weights
from disam_peft.experiments.run_folder import ADAPTER, find_run, warn_if_unfinished
from disam_peft.export.lora import export_lora
from disam_peft.export.merged import export_merged
from disam_peft.export.peft import export_peft


def export_run(
    folder: Path,
    to: str,
    output: Path,
    *,
    held_out: str | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    precision: Precision | None = None,
) -> Path:
    """Export the adapter of a run: ``peft`` (the adapter alone), ``merged`` (a complete checkpoint of its family) or
    ``lora`` (the nearest plain LoRA of a rank).

    Args:
        output: a folder that is new or empty.
        held_out: which run is meant, where ``folder`` holds several.
        alpha: export the weights ``w0 + alpha (w1 - w0)`` in place of the trained ones w1; w0 are the zero-shot weights
            (WiSE-FT). The folder says so: an adapter in ``trained_with`` of its manifest, a merged checkpoint in
            ``disam_peft_export.json``.
        rank: of ``lora``; unset: 16. How far it is from the adapter is said, and stands in ``disam_peft_lora.json``.
        precision: of the frozen weights, where it is to be another than that which the adapter was trained on.

    Raises:
        UserError: several runs in ``folder`` and none chosen; an ``output`` that holds files; an adapter that cannot
            be merged, or that does not lie on a line from zero-shot weights; an alpha that is negative or not finite.
    """
    check_form(to, rank)
    run = find_run(folder, held_out)
    if alpha is not None:
        require_alpha(alpha)
        require_zero_shot_weights(run)
    warn_if_unfinished(run)
    source = run / ADAPTER
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; choose another --output, or remove it")
    classifier = load_adapter(source, precision=precision)
    trained_with = dict(read_manifest(source).trained_with)
    if to == "peft":
        if alpha is not None and classifier.adapter is not None:
            classifier.adapter.settle(classifier.backbone, classifier.prompts, alpha)
            trained_with["alpha"] = alpha
        export_peft(output, classifier, trained_with=trained_with)
        return output
    with put_at(classifier, alpha):
        if to == "merged":
            export_merged(output, classifier, alpha=alpha)
        else:
            told = trained_with if alpha is None else {**trained_with, "alpha": alpha}
            export_lora(output, classifier, rank=RANK if rank is None else rank, trained_with=told)
    return output
