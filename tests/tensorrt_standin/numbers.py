"""What an engine computes: its ONNX model in ONNX Runtime on the CPU, with TensorRT's types at the borders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from tensorrt_standin.plan import Plan

NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "INT8": np.dtype(np.int8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "BF16": np.dtype(np.uint16),  # the bits
}
_ONNX_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class Numbers:
    """The model of one plan, ready to run."""

    def __init__(self, plan: Plan) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if b"QuantizeLinear" in plan.model:  # its optimiser refuses some 8-bit graphs, and computes others otherwise
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(plan.model, options, providers=["CPUExecutionProvider"])
        self._inputs = {item.name: _ONNX_TYPES[item.type] for item in self._session.get_inputs()}
        self._outputs = {item.name: NUMPY_TYPES[item.dtype] for item in plan.bindings if not item.is_input}
        self._shapes: dict[tuple[object, ...], dict[str, tuple[int, ...]]] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs in TensorRT's types."""
        feeds = {name: np.asarray(value).astype(self._inputs[name]) for name, value in inputs.items()}
        names = list(self._outputs)
        results = self._session.run(names, feeds)
        return {name: value.astype(self._outputs[name]) for name, value in zip(names, results, strict=True)}

    def output_shapes(
        self, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs for those input shapes and shape values, by running zeros through the model."""
        key = (tuple(sorted(shapes.items())), tuple(sorted(values.items())))
        if key not in self._shapes:
            feeds = {name: np.zeros(shape, self._inputs[name]) for name, shape in shapes.items()}
            feeds |= {name: np.array(value, self._inputs[name]).reshape(shapes[name]) for name, value in values.items()}
            self._shapes[key] = {name: value.shape for name, value in self.run(feeds).items()}
        return self._shapes[key]
