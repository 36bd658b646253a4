"""What the reference loops share: array types, the published epsilon, sorting, rows of length one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from holov_export.tensors import Int64Array

Saliency = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]

#: epsilon of HoloV's published code; here also the shortest length that a row is divided by
EPSILON = np.float32(1e-6)


def descending(values: Saliency) -> Int64Array:
    """Indices from the largest to the smallest value; the lower index first where values are equal."""
    return np.argsort(-values, kind="stable").astype(np.int64)


def unit_rows(features: Features) -> Features:
    """[N, D]: each row divided by its length; a row of zeros stays zero, where published codes divide zero by zero."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), EPSILON)
