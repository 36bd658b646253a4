"""The channels of an activation that its norm makes much larger than the others, as the norm's weights tell.

Trained encoders have a few of them. In 8 bits they decide the scale of every token, and all other channels are rounded
coarsely. Nothing has to be run to find those that a norm makes. What is large before the norm already is not seen here;
smoothing with a calibration (`smooth`) sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir as ir

Channels = npt.NDArray[np.int64]
#: times the median of a norm's weights. Measured on one tower only, whose outliers are 15 times the others
_FACTOR = 4.0
#: channels of which one may be an outlier; where there are more, they are no outliers
_ONE_OF = 16


def outlier_channels(activation: ir.Value) -> Channels:
    """Which channels of what a norm gives are outliers, ascending; none of any other activation."""
    weights = _norm_weights(activation.producer())
    if weights is None:
        return np.empty(0, np.int64)
    size = np.abs(weights)
    found = np.flatnonzero(size > _FACTOR * np.median(size))
    return found.astype(np.int64) if found.size * _ONE_OF <= size.size else np.empty(0, np.int64)


def _norm_weights(node: ir.Node | None) -> npt.NDArray[np.float32] | None:
    """What a norm multiplies the channels by: of the operator itself, or of the Mul that ends one in parts."""
    if node is None or node.op_type not in ("LayerNormalization", "RMSNormalization", "Mul"):
        return None
    places = (0, 1) if node.op_type == "Mul" else (1,)
    for place in places:
        value = node.inputs[place]
        tensor = None if value is None else value.const_value
        if tensor is not None and len(tensor.shape) == 1 and tensor.size > 1:
            return tensor.numpy().astype(np.float32)
    return None
