"""Domains of training images that nobody labelled, found from CLIP's image features. N images, K domains, E width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import zero_shot
from disam_peft.common.progress import track
from disam_peft.config.data import DomainsConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.loader import make_eval_loader
from disam_peft.errors import UserError

STARTS = 10
BATCH = 64


@dataclass(frozen=True)
class InferredDomains:
    """The training images with inferred domains, and how these relate to the domains of the data.

    Attributes:
        purity: share of the images whose domain in the data is the most frequent one of their inferred domain; 1 where
            every inferred domain lies within one domain of the data.
        counts: inferred domain -> domain of the data -> number of images.
    """

    dataset: DomainDataset
    purity: float
    counts: dict[str, dict[str, int]]


def infer_domains(
    config: DomainsConfig,
    backbone: ClipBackbone,
    training: DomainDataset,
    seed: int,
    *,
    workers: int | Literal["auto"] = "auto",
) -> InferredDomains:
    """Give every image of ``training`` a domain as ``config`` says. With ``none``, the domains of the data stay.

    Args:
        backbone: before any adapter is attached.
        seed: of the starts of k-means.

    Raises:
        UserError: fewer images than clusters; all images in one domain.
    """
    if config.infer == "none":
        return _related(training, training.domains, training.domain_ids)
    features_NE = _features(backbone, training, workers)
    if config.infer == "kmeans":
        assert config.k is not None  # checked with the config
        ids_N = clusters(features_NE.double().numpy(), training.labels, config.k, seed)
        names = tuple(f"cluster {number}" for number in range(config.k))
    else:
        assert config.prompts is not None
        names = tuple(config.prompts)
        styles = zero_shot(backbone, tuple(config.prompts.values()), ("{}",))
        with torch.no_grad():
            directions_KE = styles.class_features().float().cpu()
        ids_N = (features_NE @ directions_KE.T).argmax(dim=1).numpy()
    if len(np.unique(ids_N)) == 1:
        raise UserError(
            f"domains.infer={config.infer} puts all {len(ids_N)} training images into {names[ids_N[0]]!r}; "
            "use other prompts, or kmeans"
        )
    return _related(training, names, ids_N)


def clusters(features_NE: np.ndarray, labels_N: np.ndarray, k: int, seed: int) -> np.ndarray:
    """(N,) int64, the cluster of each image, numbered by size with the largest first: the best of ten k-means++ starts.

    The mean of its class is subtracted from each feature, because clusters would else be the classes.

    Raises:
        UserError: fewer images than clusters.
    """
    from scipy.cluster.vq import kmeans2  # half a second of imports, which only this way of inference needs

    if len(features_NE) < k:
        raise UserError(f"domains.k={k}: there are only {len(features_NE)} training images; use fewer clusters")
    centred_NE = features_NE.copy()
    for label in np.unique(labels_N):
        centred_NE[labels_N == label] -= features_NE[labels_N == label].mean(axis=0)
    best, least = np.zeros(len(centred_NE), dtype=np.int64), np.inf
    for start in range(STARTS):
        centres_KE, ids_N = kmeans2(centred_NE, k, iter=50, minit="++", rng=np.random.default_rng([seed, start]))
        cost = float(((centred_NE - centres_KE[ids_N]) ** 2).sum())
        if cost < least:
            best, least = ids_N.astype(np.int64), cost
    by_size = np.argsort(-np.bincount(best, minlength=k), kind="stable")
    return np.argsort(by_size)[best]


@torch.no_grad()
def _features(backbone: ClipBackbone, dataset: DomainDataset, workers: int | Literal["auto"]) -> Tensor:
    """Normalised image features (N, E), float32 on the CPU."""
    like = next(backbone.model.parameters())
    loader = make_eval_loader(dataset, backbone.image_transform, BATCH, workers=workers)
    parts = []
    for batch in track(loader, "inferring domains", total=len(loader)):
        features_BE = backbone.encode_image(batch["pixels"].to(like.device, like.dtype))
        parts.append(torch.nn.functional.normalize(features_BE.float(), dim=-1).cpu())
    return torch.cat(parts)


def _related(dataset: DomainDataset, names: tuple[str, ...], ids_N: np.ndarray) -> InferredDomains:
    counts_KD = np.zeros((len(names), len(dataset.domains)), dtype=np.int64)
    np.add.at(counts_KD, (ids_N, dataset.domain_ids), 1)
    return InferredDomains(
        replace(dataset, domains=names, domain_ids=ids_N.astype(np.int64)),
        float(counts_KD.max(axis=1).sum() / len(dataset)),
        {
            name: {dataset.domains[d]: int(row[d]) for d in np.flatnonzero(row)}
            for name, row in zip(names, counts_KD, strict=True)
            if row.any()
        },
    )
