"""Our classifier and the peer's model at the same weights, and the training steps of both on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from disam_peft.adapters.base import Autocast
from disam_peft.classification.classifier import ClipClassifier

from .steps import Batch, Rows, Step, Stored, ours, peer_erm, peer_sam


@dataclass(frozen=True)
class Pair:
    """Built once; steps of any batch size and precision are built on it.

    Attributes:
        classifier: ours, in training mode.
        peer: the peer's model, whole.
        params: what the peer trains, by the names of ours.
        logits: of the peer, images (B, 3, H, W) to (B, C).
    """

    classifier: ClipClassifier
    peer: nn.Module
    params: Mapping[str, Tensor]
    logits: Callable[[Tensor], Tensor]

    def steps(
        self, batch_size: int, *, autocast: Autocast = nullcontext, store: Callable[[Tensor], Rows] = Stored
    ) -> dict[str, Step]:
        """Every variant by name: ``sam`` and ``erm`` are the peer's; ours say whether they read from a store."""
        classifier = self.classifier
        batch = Batch.draw(batch_size, classifier.backbone, len(classifier.class_names))
        with autocast():
            stored = store(classifier.encode_frozen(batch.pixels_BCHW))

        def logits() -> Tensor:
            return self.logits(batch.pixels_BCHW)

        found = {
            "sam": peer_sam(self.params, logits, batch.labels_B, autocast=autocast),
            "erm": peer_erm(self.params, logits, batch.labels_B, autocast=autocast),
        }
        for ending, source in (("", None), (", stored", stored)):
            found |= {
                f"our disam{ending}": ours(classifier, batch, stored=source, autocast=autocast),
                f"our sam{ending}": ours(classifier, batch, variance_weight=0.0, stored=source, autocast=autocast),
                f"our erm{ending}": ours(classifier, batch, rho=0.0, stored=source, autocast=autocast),
            }
        return found
