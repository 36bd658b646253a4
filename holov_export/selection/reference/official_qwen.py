"""`holov-official` for Qwen2.5-VL, as loops: what the published port does, see `selection.official_qwen`."""

from __future__ import annotations

import numpy as np

from holov_export.selection.geometry import crops_of_ids, crops_of_official_qwen
from holov_export.selection.reference.arrays import Saliency
from holov_export.selection.reference.holov import holov_official_positions
from holov_export.tensors import Int64Array


def official_qwen_positions(saliency: Saliency, source: Int64Array, quota: int) -> Int64Array:
    """Kept positions of one picture in output order; N is the vision_start token, -1 a zero row.

    Candidate 0 is the vision_start token, candidate i the image token i - 1; the last image token is none and stays.

    Args:
        saliency: float32 [N], of each token. source: int64 [N], the tower's row of each. quota: 1..N.

    Source: obananas/HoloV qwen-model-HoloV/{utils,modeling_qwen2_5_vl}.py@1d2e65e.
    """
    tokens, keep = len(saliency), quota - 1
    by_window = saliency[np.argsort(source)]
    strips = crops_of_ids(crops_of_official_qwen(tokens, max(keep, 1)))
    kept = holov_official_positions(by_window, keep, strips)
    positions = np.where(kept == 0, tokens, np.where(kept > 0, kept - 1, -1))
    return np.append(positions, tokens - 1)
