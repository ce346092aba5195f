"""CLIP's contrastive loss between the images and the captions of the whole batch.

The caption of a sample is its class in one template. Captions that are equal are told apart by nothing, so the loss is
a function of how often each of them occurs: for the cosines ``z_ic`` of image i and caption c, times the logit scale,

    image to text   log sum_c n_c exp(z_ic) - z_i,c_i               n_c: samples of the batch with the caption c
    text to image   log S_c_i - z_i,c_i,   S_c = sum_k exp(z_kc)    over the images k of the batch

and the loss is the mean of both over the samples. The n_c are known before anything is computed, so the first line is a
loss of each sample by itself; S_c is a sum over samples, as those of penalties are. So it is that of the whole batch,
however it is divided over processes and micro-batches.

Shapes in this file: B samples of a micro-batch, C classes, T templates, N = C * T captions (the templates of a class
side by side), E embedding width, P places of samples in the whole batch, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disam_peft.common.device import to_device
from disam_peft.common.random import keyed_uniforms
from disam_peft.config.losses import ContrastiveConfig
from disam_peft.disam.domain_objective import DomainsOfSamples
from disam_peft.disam.domain_sums import DomainSums, accumulation_dtype
from disam_peft.disam.ranks import Ranks
from disam_peft.objectives.base import Loss, Outputs, StepBatch


def image_to_text(logits_BN: Tensor, caption_B: Tensor, count_N: Tensor) -> Tensor:
    """``log sum_c n_c exp(z_ic) - z_i,c_i`` for each image, (B,).

    Args:
        logits_BN: scaled cosines of images and captions, at least float32.
        caption_B: the caption of each image.
        count_N: how often each caption occurs in the whole batch.
    """
    true_B = logits_BN.gather(1, caption_B[:, None])[:, 0]
    return (logits_BN + count_N.to(logits_BN.dtype).log()).logsumexp(dim=1) - true_B


def text_to_image(sum_N: Tensor, true: Tensor, count_N: Tensor) -> Tensor:
    """Mean over the samples of ``log S_c_i - z_i,c_i``, shape (), from sums over the whole batch.

    Args:
        sum_N: S_c, the sum over images of ``exp(z_kc)``.
        true: the sum over samples of ``z_i,c_i``, shape (). Both may be of ``z`` minus one number, which cancels.
        count_N: how often each caption occurs.
    """
    log_N = sum_N.where(count_N > 0, 1.0).log()
    return ((count_N * log_N).sum() - true) / count_N.sum()


def contrastive(features_BE: Tensor, captions_BE: Tensor, scale: float | Tensor = 100.0) -> Tensor:
    """CLIP's symmetric loss of pairs of an image and a caption, shape (), in the plain way, for one whole batch.

    Args:
        features_BE: normalised image features.
        captions_BE: normalised text features of the caption of each image; equal captions count as others.
    """
    logits_BB = scale * features_BE @ captions_BE.T
    true_B = logits_BB.diagonal()
    return ((logits_BB.logsumexp(dim=1) - true_B) + (logits_BB.logsumexp(dim=0) - true_B)).mean() / 2


@dataclass(frozen=True)
class _Captions:
    """Of the batch of one step.

    Attributes:
        template_P: the template of the sample at each place.
        count_N: how often each caption occurs, over all processes and micro-batches.
        templates: T.
    """

    template_P: Tensor
    count_N: Tensor
    templates: int

    def of(self, outputs: Outputs) -> Tensor:
        """The caption of each sample, (B,)."""
        place_B, _ = outputs.places
        return outputs.labels_B * self.templates + self.template_P[place_B]


class Contrastive(Loss):
    """See the head of this file. The losses of samples are half of image to text, the rest is a function of sums.

    DISAM's variance over domains is that of the losses of samples, hence of the half that belongs to one sample.
    """

    config: ContrastiveConfig
    needs_features = True
    needs_captions = True
    num_statistics = 2

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config)
        self._captions: _Captions | None = None

    def begin_batch(self, batch: StepBatch) -> None:
        """Draws the templates, by seed, step and place, and counts captions over all processes in a collective."""
        device = batch.labels_B.device
        drawn_P = keyed_uniforms(batch.num_places, batch.seed, "captions", batch.step) * batch.templates
        template_P = to_device(torch.from_numpy(drawn_P).long(), device)
        caption_B = batch.labels_B * batch.templates + template_P[batch.place_B]
        counted_B = torch.ones(len(caption_B), dtype=accumulation_dtype(device), device=device)
        if batch.mask_B is not None:
            counted_B = counted_B.where(batch.mask_B, 0.0)
        count_N = counted_B.new_zeros(batch.num_classes * batch.templates).index_add(0, caption_B, counted_B)
        count_N = Ranks.of(batch.process_group, reduces_here=True).summed(count_N)
        self._captions = _Captions(template_P, count_N, batch.templates)

    def __call__(self, outputs: Outputs) -> Tensor:
        if outputs.share_B is not None:
            raise ValueError("a mixed image has no caption: the contrastive loss cannot train on mixtures")
        captions = self._begun()
        return 0.5 * image_to_text(_logits(outputs), captions.of(outputs), captions.count_N)

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        logits_BN, scale = _logits(outputs), outputs.logit_scale
        # cosines minus one are never positive, so that nothing overflows; exp of -200 is far above float64's smallest
        shifted_BN = logits_BN.to(accumulation_dtype(logits_BN.device)) - scale.to(logits_BN)
        true_B = shifted_BN.gather(1, self._begun().of(outputs)[:, None])[:, 0]
        return domains.sums(shifted_BN.exp()), domains.sums(true_B)

    def value(self, sums: DomainSums) -> Tensor:
        sum_DN, true_D = sums.statistics
        return 0.5 * text_to_image(sum_DN.sum(dim=0), true_D.sum(), self._begun().count_N)

    def _begun(self) -> _Captions:
        if self._captions is None:
            raise ValueError(
                "the contrastive loss compares all samples of a batch; call Objective.begin_batch(labels, ...) with "
                "those of this process once in each step, before DISAM.backward"
            )
        return self._captions


def _logits(outputs: Outputs) -> Tensor:
    """Scaled cosines of images and captions, (B, N), in at least float32."""
    features_BE = outputs.features
    wide = torch.promote_types(features_BE.dtype, torch.float32)
    with torch.autocast(features_BE.device.type, enabled=False):
        return outputs.logit_scale.to(wide) * features_BE.to(wide) @ outputs.caption_features.to(wide).T
