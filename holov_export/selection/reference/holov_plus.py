"""`holov-plus` as loops over the tokens of one picture. The equations are in docs/holov-plus.md."""

from __future__ import annotations

import numpy as np

from holov_export.selection.reference.arrays import EPSILON, Features, Saliency, descending
from holov_export.tensors import Int64Array

#: a token that differs from the mean by less than this share of its length differs from nothing: that is rounding
SMALLEST_SHARE = np.float32(1e-4)


def holov_plus_positions(
    saliency: Saliency, features: Features, quota: int, strips: tuple[Int64Array, ...]
) -> Int64Array:
    """Quotas of the crops by the mean of their scores; what floors leave over goes to the best of the whole picture.

    Tokens of negative saliency are gone: they have no part in the mean, come before nobody, and are kept last.
    """
    alive = saliency >= 0
    unit = centred_rows(features, alive)
    inside = np.zeros_like(saliency)
    for strip in strips:
        inside[strip] = novel_scores(saliency[strip], unit[strip])
    means = np.array([inside[strip].sum(dtype=np.float32) / np.float32(len(strip)) for strip in strips])
    weights = (means / max(means.sum(dtype=np.float32), np.float32(1e-30))).astype(np.float32)
    kept: list[int] = []
    for strip, weight in zip(strips, weights, strict=True):
        left = strip[alive[strip]]
        share = int(np.floor(weight * np.float32(quota)))
        kept.extend(left[descending(inside[left])[:share]])
    chosen = set(kept)
    whole = np.where(alive, novel_scores(saliency, unit), np.float32(-1))
    others = [position for position in descending(whole) if position not in chosen]
    kept.extend(others[: quota - len(kept)])
    return np.sort(np.array(kept[:quota], dtype=np.int64))


def centred_rows(features: Features, alive: np.ndarray) -> Features:
    """[N, D]: what each token differs by from the mean of those that are there, at length one; zero for the others."""
    mean = features[alive].sum(axis=0, dtype=np.float32) / np.float32(max(int(alive.sum()), 1))
    centred = np.where(alive[:, None], features - mean, np.float32(0)).astype(np.float32)
    shortest = np.maximum(SMALLEST_SHARE * np.linalg.norm(features, axis=1, keepdims=True), EPSILON)
    unit: Features = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), shortest)
    return unit


def novel_scores(saliency: Saliency, unit: Features) -> Saliency:
    """A^(1/4) (1 - the largest positive cosine to a token that is more salient, or as salient and earlier)."""
    scores = np.zeros_like(saliency)
    before: list[int] = []
    for token in descending(saliency):
        nearest = max([np.float32(0), *(unit[before] @ unit[token])])
        root = np.sqrt(np.sqrt(max(saliency[token], np.float32(0))))
        scores[token] = root * max(np.float32(1) - nearest, np.float32(0))
        before.append(int(token))
    return scores
