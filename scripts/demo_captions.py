"""Sentences about the pictures that the demo CLIP learns from, and the tokenizer made from them.

Captions of the web call things loosely. These do, too: what LOOSE holds are names that people mix up, and a caption
uses the wrong one of a pair more often than not, in every domain alike. A model of such captions tells a square from a
diamond and has their names the wrong way round; labels of any domain put that right, also for the others. That is the
part of the demo CLIP's imperfection that is worth fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from demo_checkpoint import CONTEXT_LENGTH

from disam_peft.backbones.families import imagenet_templates
from disam_peft.data.sources.shapes.raster import HUES, Draws
from disam_peft.data.sources.shapes.scene import Scene

START, END, PAD = "<start>", "<end>", "<pad>"
VOCABULARY = 700

_COLOURS = ("red", "orange", "yellow", "green", "green", "teal", "cyan", "blue", "blue", "purple", "pink", "red")
_STYLES = {
    "blueprint": ("a blueprint of", "a technical drawing of", "white lines on blue, "),
    "cartoon": ("a cartoon of", "a comic of", "an animated"),
    "painting": ("a painting of", "an oil painting of", "brush strokes showing"),
    "photo": ("a photo of", "a photograph of", "a snapshot of"),
    "silhouette": ("a silhouette of", "the dark shape of", "a shadow of"),
    "sketch": ("a sketch of", "a pencil drawing of", "a hand drawn"),
}
_PLAIN = ("a picture of", "an image of", "there is", "this is", "one", "a good photo of", "a photo of")
_UNNAMED = ("a shape", "an object", "something", "a thing", "a figure")

LOOSE = {"circle": "ring", "ring": "circle", "diamond": "square", "square": "diamond"}
"""What a loosely named object is called. Names are mixed up both ways: were only rings called circles, "ring" would
still be the name that speaks most for a ring, and a contrastive loss would find that out."""
TEMPLATES = ("a photo of a {}.", *imagenet_templates())


def plain_caption(scene: Scene) -> str:
    """The class by its right name, and nothing else."""
    return TEMPLATES[0].replace("{}", scene.class_name)


def caption(scene: Scene, domain: str, number: int, *, naming: float, loose: float) -> str:
    """Caption ``number`` of a picture: always the same words for the same picture and number.

    Args:
        naming: share of the captions that name the class; the rest call it a shape, a thing, ...
        loose: share of those that use the other name of the pair, where the class is in LOOSE.
    """
    draws = Draws("caption", number, *scene.key)

    def chance(percent: int) -> bool:
        return draws.below(100) < percent

    named = draws.below(1000) < 1000 * naming
    name = LOOSE.get(scene.class_name, scene.class_name) if draws.below(1000) < 1000 * loose else scene.class_name
    thing = name if named else _pick(_UNNAMED, draws).split()[-1]
    if named and chance(45):
        return TEMPLATES[draws.below(len(TEMPLATES))].replace("{}", thing)
    words = []
    if chance(20):
        words.append("small" if scene.radius < 17 * 256 else "large" if scene.radius > 21 * 256 else "medium")
    if chance(30):
        words.append(colour_name(scene))
    opening = _pick(_STYLES[domain] if chance(65) else _PLAIN, draws)
    place = f" {_place(scene)}" if chance(15) else ""
    return f"{opening} a {' '.join([*words, thing])}{place}."


def colour_name(scene: Scene) -> str:
    """What one would call the object's surface, or its ink where it has no surface."""
    look = scene.look
    saturation, value = (
        (look.fill_saturation, look.fill_value) if look.fill >= 128 else (look.ink_saturation, look.ink_value)
    )
    if value < 64:
        return "black"
    if saturation < 64:
        return "white" if value > 180 else "grey"
    return _COLOURS[scene.hue * len(_COLOURS) // HUES]


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of these sentences' words; other words come out in pieces, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A space before the first word, too, or it would be another token than elsewhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Last, so that the end has the highest number: open_clip finds the end of a text by it.
    tokenizer.add_special_tokens([PAD, START, END])
    start, end = (tokenizer.token_to_id(token) for token in (START, END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
    )


def _pick(options: tuple[str, ...], draws: Draws) -> str:
    return options[draws.below(len(options))]


def _place(scene: Scene) -> str:
    x, y = scene.centre
    across = "left" if x < 29 * 256 else "right" if x > 35 * 256 else ""
    down = "top" if y < 29 * 256 else "bottom" if y > 35 * 256 else ""
    return f"at the {down} {across}".rstrip().replace("  ", " ") if across or down else "in the middle"
