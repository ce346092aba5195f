"""The verb ``predict``: classes of new images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disam_peft.cli.terminal import say
from disam_peft.errors import UserError

if TYPE_CHECKING:
    from disam_peft.inference.prediction import Prediction

_PRECISIONS = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


def predict(
    model: Annotated[str, typer.Argument(help="A run, an exported folder, or the name of a CLIP: ViT-B-32:openai.")],
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns in quotes, tables of paths, or - for standard input.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write the rows there: .csv, .jsonl or .parquet. Unset: show them.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes of each image are told.")] = 5,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Below this probability the label is 'unknown'.")
    ] = 0.0,
    classes: Annotated[
        str | None, typer.Option(help="Other classes: names with commas, or a file with one in each line.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A sentence with {} for the class; several are averaged.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weights between zero-shot (0) and trained (1), or beyond; unset: trained.")
    ] = None,
    held_out: Annotated[str | None, typer.Option(help="Which run, if the folder holds several.")] = None,
    image_column: Annotated[str | None, typer.Option(help="The column of a table with the paths.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    workers: Annotated[str, typer.Option(help="Processes that read images; auto: as the machine has cores.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp16.")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an --output that is not complete.")] = False,
) -> None:
    """Classify images with a trained classifier. An image that cannot be read has a row that says why; the exit code is
    1 then."""
    from disam_peft.inference.image_paths import STDIN, image_paths

    if precision not in _PRECISIONS:
        raise UserError(f"--precision {precision} is none of {', '.join(_PRECISIONS)}")
    if resume and output is None:
        raise UserError("--resume goes on with a file; name it by --output")
    if workers != "auto" and not workers.isdecimal():
        raise UserError(f"--workers {workers} is neither auto nor a number")
    paths = image_paths(images, column=image_column, lines=sys.stdin if STDIN in images else ())
    names = None if classes is None else _class_names(classes)
    from disam_peft.common.processes import is_main
    from disam_peft.inference.loaded_classifier import load_classifier
    from disam_peft.inference.predict_images import predict_images

    errors = predict_images(
        lambda device: load_classifier(
            model, held_out=held_out, device=device, classes=names, templates=template, alpha=alpha
        ),
        paths,
        output=output,
        show=_show,
        top=top,
        threshold=threshold,
        batch_size=batch_size,
        workers=workers if workers == "auto" else int(workers),  # type: ignore[arg-type]
        precision=_PRECISIONS[precision],
        resume=resume,
    )
    if not is_main():
        return
    if output is not None:
        say(f"wrote {output}: {len(paths)} rows")
    if errors:
        say(f"{errors} of {len(paths)} images could not be read; their rows say why", err=True)
        raise typer.Exit(1)


def _class_names(text: str) -> list[str]:
    path = Path(text)
    try:
        listed = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {text} cannot be read: {error}") from error
    names = [name.strip() for name in listed if name.strip()]
    if not names:
        raise UserError(f"--classes {text!r} names no class")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--classes names {', '.join(twice)} more than once")
    return names


def _show(row: Prediction) -> None:
    if row.error is not None:
        say(f"{row.path}: {row.error}")
        return
    ranks = ", ".join(f"{name} {100 * value:.1f} %" for name, value in row.top)
    say(f"{row.path}: {ranks}" if row.label == row.top[0][0] else f"{row.path}: {row.label} ({ranks})")
