"""A small engine for the tests of the stand-ins: a model with a dynamic batch and a shape value, built and run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import tensorrt_standin
from tensorrt_standin import FakeGpu, World

H200 = FakeGpu()
OLD, NEW = "8.6.0", "11.4.0"


def small_model(opset: int = 17, *extra: onnx.NodeProto) -> onnx.ModelProto:
    """x [b, 8, 3] is projected, its first `budget` rows are kept and divided by it; counts = min(quota, budget)."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "weights"], ["projected"], name="project"),
        node("Slice", ["projected", "zero", "budget", "one"], ["kept"], name="cut"),
        node("Cast", ["budget"], ["divisor"], name="widen", to=TensorProto.FLOAT),
        node("Div", ["kept", "divisor"], ["y"], name="divide"),
        node("Min", ["quota", "budget"], ["counts"], name="clamp"),
        *extra,
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [
            info("x", TensorProto.FLOAT, ["batch", 8, 3]),
            info("budget", TensorProto.INT64, [1]),
            info("quota", TensorProto.INT64, ["batch"]),
        ],
        [info("y", TensorProto.FLOAT, ["batch", "k", 16]), info("counts", TensorProto.INT64, ["batch"])],
        [
            numpy_helper.from_array(np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32), "weights"),
            numpy_helper.from_array(np.array([0]), "zero"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def creation_flags(trt: ModuleType) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    if hasattr(trt.BuilderFlag, "BF16"):
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0


class Parsed:
    """A builder with everything it needs for an engine of the small model."""

    def __init__(self, trt: ModuleType, model: onnx.ModelProto | None = None, *, flags: int | None = None) -> None:
        self.trt = trt
        self.logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(creation_flags(trt) if flags is None else flags)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.ok = self.parser.parse((model or small_model()).SerializeToString())
        self.config = self.builder.create_builder_config()

    def add_profile(self, batch: int = 4, budget: int = 8) -> int:
        profile = self.builder.create_optimization_profile()
        profile.set_shape("x", (1, 8, 3), (2, 8, 3), (batch, 8, 3))
        profile.set_shape("quota", (1,), (2,), (batch,))
        profile.set_shape_input("budget", [1], [min(4, budget)], [budget])
        return self.config.add_optimization_profile(profile)

    def plan(self) -> Any:
        return self.builder.build_serialized_network(self.network, self.config)

    def engine(self) -> Any:
        self.add_profile()
        plan = self.plan()
        assert plan is not None, tensorrt_standin.current().messages
        return self.trt.Runtime(self.logger).deserialize_cuda_engine(plan)


class Run:
    """One context with device memory for the largest shapes, all of cuda-python's errors checked."""

    def __init__(self, engine: Any, context: Any = None) -> None:
        from cuda.bindings import runtime  # the stand-in

        self.cuda = runtime
        self.engine = engine
        self.context = engine.create_execution_context() if context is None else context
        self.stream = self.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.pointers = {name: self.call("cudaMalloc", size) for name, size in
                         (("x", 384), ("quota", 32), ("y", 2048), ("counts", 32))}  # fmt: skip
        for name, pointer in self.pointers.items():
            assert self.context.set_tensor_address(name, pointer)
        self.integers = np.int32 if engine.get_tensor_dtype("quota").name == "INT32" else np.int64
        self.budget = np.zeros(1, self.integers)
        assert self.context.set_tensor_address("budget", self.budget.ctypes.data)

    def call(self, name: str, *args: Any) -> Any:
        error, *values = getattr(self.cuda, name)(*args)
        assert error == self.cuda.cudaError_t.cudaSuccess, f"{name}: {error!r}"
        return values[0] if len(values) == 1 else values

    def shape(self, batch: int, budget: int) -> None:
        assert self.context.set_input_shape("x", (batch, 8, 3))
        assert self.context.set_input_shape("quota", (batch,))
        self.budget[0] = budget

    def put(self, x: np.ndarray, quota: np.ndarray) -> None:
        for name, value in (("x", x), ("quota", quota.astype(self.integers))):
            data = np.ascontiguousarray(value)
            kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            self.call("cudaMemcpyAsync", self.pointers[name], data.ctypes.data, data.nbytes, kind, self.stream)

    def enqueue(self) -> bool:
        return self.context.execute_async_v3(int(self.stream))

    def get(self) -> dict[str, np.ndarray]:
        results = {"y": np.empty(tuple(self.context.get_tensor_shape("y")), np.float32)}
        results["counts"] = np.empty(tuple(self.context.get_tensor_shape("counts")), self.integers)
        for name, value in results.items():
            kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.call("cudaMemcpyAsync", value.ctypes.data, self.pointers[name], value.nbytes, kind, self.stream)
        return results

    def capture(self) -> Any:
        """The executable graph of one execution."""
        self.call("cudaStreamBeginCapture", self.stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal)
        assert self.enqueue()
        graph = self.call("cudaStreamEndCapture", self.stream)
        executable = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return executable

    def close(self) -> None:
        for pointer in self.pointers.values():
            self.call("cudaFree", pointer)
        self.call("cudaStreamDestroy", self.stream)


def expected(x: np.ndarray, quota: np.ndarray, budget: int) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(small_model().SerializeToString())
    return session.run(None, {"x": x, "quota": quota, "budget": np.array([budget])})


def inputs(batch: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(batch)
    return numbers.standard_normal((batch, 8, 3)).astype(np.float32), numbers.integers(1, 9, batch)


@contextmanager
def running(version: str = "10.3.0") -> Iterator[tuple[Run, World]]:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        yield Run(Parsed(trt).engine()), tensorrt_standin.current()
