"""The rules of building, loading and running that the stand-ins of TensorRT enforce."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_standin
from tensorrt_standin import VERSIONS, FakeGpu, Misuse
from tensorrt_standin.trial import H200, NEW, OLD, Parsed, Run, expected, inputs, running, small_model

every_version = pytest.mark.parametrize("version", VERSIONS)


# ---------------------------------------------------------------------------------------------------- the builder


def refused(parsed: Parsed) -> str:
    """The error of a build that has to fail."""
    assert parsed.plan() is None
    severity, text = tensorrt_standin.current().messages[-1]
    assert severity == "ERROR"
    return text


@every_version
def test_dynamic_inputs_need_a_whole_profile(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        parsed = Parsed(trt)
        assert "no optimization profile has been defined" in refused(parsed)
        empty = parsed.builder.create_optimization_profile()
        assert parsed.config.add_optimization_profile(empty) == -1
        profile = parsed.builder.create_optimization_profile()
        profile.set_shape("x", (1, 8, 3), (2, 8, 3), (4, 8, 3))
        assert parsed.config.add_optimization_profile(profile) == 0
        profile.set_shape_input("budget", [1], [2], [3])
        assert "quota: dynamic input is missing dimensions in profile 0" in refused(parsed)
        profile.set_shape("quota", (1,), (2,), (4,))
        assert parsed.plan() is not None


def test_profiles_refuse_what_is_out_of_order() -> None:
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:
        parsed = Parsed(trt)
        profile = parsed.builder.create_optimization_profile()
        with pytest.raises(RuntimeError, match="Shape provided for opt is inconsistent"):
            profile.set_shape("x", (3, 8, 3), (2, 8, 3), (4, 8, 3))
        with pytest.raises(RuntimeError, match="max input provided for shape tensor is inconsistent"):
            profile.set_shape_input("budget", [1], [4], [3])
        profile.set_shape("x", (1, 8, 3), (2, 8, 3), (4, 8, 3))
        assert profile.get_shape("x") == [(1, 8, 3), (2, 8, 3), (4, 8, 3)] and profile.get_shape("quota") == []
        profile.set_shape("quota", (1,), (2,), (4,))
        parsed.config.add_optimization_profile(profile)
        assert "missing values for shape input" in refused(parsed)
        profile.set_shape_input("budget", [1, 1], [2, 2], [3, 3])
        assert "2 values for a shape tensor of 1" in refused(parsed)


def test_strong_typing_refuses_precision_flags_and_pins() -> None:
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:
        parsed = Parsed(trt)
        parsed.add_profile()
        parsed.config.set_flag(trt.BuilderFlag.FP16)
        assert "FP16 are not allowed with a strongly typed network" in refused(parsed)
        parsed.config.clear_flag(trt.BuilderFlag.FP16)
        parsed.network.get_layer(3).precision = trt.float32
        assert "setPrecision is not supported" in refused(parsed)
    with tensorrt_standin.installed(NEW, gpu=H200) as trt:
        layer = Parsed(trt).network.get_layer(3)
        with pytest.raises(AttributeError):
            layer.precision = trt.float32


@pytest.mark.parametrize("version", [OLD, "10.3.0"])
def test_pins_are_recorded_and_must_be_possible(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        parsed = Parsed(trt, flags=1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        parsed.add_profile()
        for flag in ("FP16", "OBEY_PRECISION_CONSTRAINTS"):
            parsed.config.set_flag(getattr(trt.BuilderFlag, flag))
        layers = {item.name: item for item in map(parsed.network.get_layer, range(parsed.network.num_layers))}
        assert layers["project"].type == trt.LayerType.MATRIX_MULTIPLY
        layers["divide"].precision = trt.float32
        layers["divide"].set_output_type(0, trt.float32)
        assert layers["divide"].precision_is_set and not layers["project"].precision_is_set
        assert parsed.plan() is not None
        (build,) = tensorrt_standin.current().builds
        assert build.pinned == {"divide": ("FLOAT", ("FLOAT",))} and {"FP16", "TF32"} <= build.flags
        layers["clamp"].precision = trt.float32  # integers only
        assert "Could not find any implementation for node clamp" in refused(parsed)


def test_settings_keep_their_rules() -> None:
    with tensorrt_standin.installed("10.13.3", gpu=FakeGpu(name="Orin", sm=72)) as trt:
        parsed = Parsed(trt)
        parsed.add_profile()
        config = parsed.config
        config.builder_optimization_level = 9
        assert config.builder_optimization_level == 3
        config.builder_optimization_level = 5
        assert config.builder_optimization_level == 5
        assert config.get_flag(trt.BuilderFlag.TF32) and config.flags == 1 << int(trt.BuilderFlag.TF32)
        with pytest.raises(TypeError, match="incompatible function arguments"):
            config.hardware_compatibility_level = "AMPERE_PLUS"
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        assert "AMPERE_PLUS needs" in refused(parsed)


def test_a_plan_is_a_buffer_and_nothing_else() -> None:
    with tensorrt_standin.installed(NEW, gpu=H200) as trt:
        parsed = Parsed(trt)
        parsed.add_profile()
        plan = parsed.plan()
        assert plan.nbytes == memoryview(plan).nbytes == len(bytes(memoryview(plan))) and plan
        for wrong in (len, iter, lambda it: it[0], lambda it: it + b""):
            with pytest.raises(TypeError):
                wrong(plan)
        assert not hasattr(plan, "hex")


def test_progress_is_told_and_a_no_cancels() -> None:
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:

        class Monitor(trt.IProgressMonitor):
            def __init__(self, answer: Any) -> None:
                trt.IProgressMonitor.__init__(self)
                self.answer, self.seen = answer, []

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                self.seen.append((phase_name, parent_phase, num_steps))

            def step_complete(self, phase_name: str, step: int) -> Any:
                return self.answer

            def phase_finish(self, phase_name: str) -> None:
                self.seen.append(phase_name)

        parsed = Parsed(trt)
        parsed.add_profile()
        for answer, built in ((True, True), (False, False), (None, False)):
            monitor = Monitor(answer)
            parsed.config.progress_monitor = monitor
            assert (parsed.plan() is not None) is built
            assert monitor.seen[0][:2] == ("Building Engine", None) and monitor.seen[-1] == "Building Engine"

        class Forgetful(trt.IProgressMonitor):
            def __init__(self) -> None:
                pass

        with pytest.raises(TypeError, match="__init__"):
            parsed.config.progress_monitor = Forgetful()


def test_a_timing_cache_is_reused_and_foreign_ones_are_refused() -> None:
    caches = {}
    for version, gpu in (("10.3.0", H200), ("10.3.0", FakeGpu(name="NVIDIA L4", sm=89)), (NEW, H200)):
        with tensorrt_standin.installed(version, gpu=gpu) as trt:
            parsed = Parsed(trt)
            parsed.add_profile()
            cache = parsed.config.create_timing_cache(b"")
            assert parsed.config.set_timing_cache(cache, False) and parsed.plan() is not None
            caches[version, gpu.name] = bytes(memoryview(parsed.config.get_timing_cache().serialize()))
            assert tensorrt_standin.current().builds[-1].new_timings == parsed.network.num_layers
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:
        parsed = Parsed(trt)
        parsed.add_profile()
        foreign = parsed.config.create_timing_cache(caches["10.3.0", "NVIDIA L4"])
        assert not parsed.config.set_timing_cache(foreign, False) and parsed.config.set_timing_cache(foreign, True)
        newer = parsed.config.create_timing_cache(caches[NEW, "NVIDIA H200"])
        assert not parsed.config.set_timing_cache(newer, True)
        assert parsed.config.create_timing_cache(b"garbage") is None
        own = parsed.config.create_timing_cache(caches["10.3.0", "NVIDIA H200"])
        assert parsed.config.set_timing_cache(own, False)
        parsed.config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
        assert parsed.plan() is not None and tensorrt_standin.current().builds[-1].new_timings == 0


# ---------------------------------------------------------------------------------------------------- loading


def plan_bytes(version: str, gpu: FakeGpu = H200, *flags: str, level: str = "NONE") -> bytes:
    with tensorrt_standin.installed(version, gpu=gpu) as trt:
        parsed = Parsed(trt)
        parsed.add_profile()
        for flag in flags:
            parsed.config.set_flag(getattr(trt.BuilderFlag, flag))
        parsed.config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
        return bytes(memoryview(parsed.plan()))


def loads(data: bytes, version: str, gpu: FakeGpu = H200, *, host_code: bool = False) -> bool:
    with tensorrt_standin.installed(version, gpu=gpu) as trt:
        runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
        runtime.engine_host_code_allowed = host_code
        loaded = runtime.deserialize_cuda_engine(data) is not None
        assert loaded or tensorrt_standin.current().messages[-1][0] == "ERROR"
        return loaded


def test_a_plan_runs_on_its_tensorrt_and_its_gpu_only() -> None:
    plan = plan_bytes("10.3.0")
    assert loads(plan, "10.3.0") and not loads(plan, "10.13.3") and not loads(plan, OLD)
    assert not loads(plan, "10.3.0", FakeGpu(name="NVIDIA L4", sm=89))
    assert loads(plan, "10.3.0", FakeGpu(name="NVIDIA H100"))
    assert not loads(plan[:-1], "10.3.0") and not loads(b"engine", "10.3.0")
    flipped = bytearray(plan)
    flipped[len(flipped) // 2] ^= 1
    assert not loads(bytes(flipped), "10.3.0")


def test_version_and_hardware_compatibility() -> None:
    plan = plan_bytes("10.3.0", H200, "VERSION_COMPATIBLE")
    assert loads(plan, "10.13.3", host_code=True) and loads(plan, NEW, host_code=True)
    assert not loads(plan, "10.13.3") and not loads(plan, OLD, host_code=True)
    lean = plan_bytes("10.3.0", H200, "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
    assert loads(lean, "10.3.0") and not loads(lean, "10.13.3", host_code=True)
    ampere = plan_bytes("10.3.0", H200, level="AMPERE_PLUS")
    assert loads(ampere, "10.3.0", FakeGpu(sm=89)) and not loads(ampere, "10.3.0", FakeGpu(sm=75))


def test_a_stripped_plan_runs_after_a_refit(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small_model(), str(path))
    plan = plan_bytes("10.3.0", H200, "STRIP_PLAN")
    assert len(plan) < len(plan_bytes("10.3.0"))
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:
        logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        run = Run(engine)
        run.shape(1, 2)
        assert not run.enqueue()
        refitter = trt.Refitter(engine, logger)
        assert refitter.get_missing_weights() == ["weights"] and not refitter.refit_cuda_engine()
        assert trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(path)) and refitter.refit_cuda_engine()
        x, quota = inputs(1)
        run.put(x, quota)
        assert run.enqueue()
        np.testing.assert_array_equal(run.get()["y"], expected(x, quota, 2)[0])
        assert not trt.Refitter(engine, logger).set_named_weights("weights", np.zeros(3, np.float32))


def test_weights_can_be_named_one_by_one_only_in_a_refittable_engine() -> None:
    with tensorrt_standin.installed(OLD, gpu=H200) as trt:
        logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        with pytest.raises(TypeError, match="factory function returned nullptr"):
            trt.Refitter(Parsed(trt).engine(), logger)
        parsed = Parsed(trt)
        parsed.config.set_flag(trt.BuilderFlag.REFIT)
        engine = parsed.engine()
        refitter = trt.Refitter(engine, logger)
        assert refitter.set_named_weights("weights", trt.Weights(np.zeros((3, 16), np.float32)))
        assert refitter.refit_cuda_engine()
        run = Run(engine)
        run.shape(1, 1)
        run.put(*inputs(1))
        assert run.enqueue() and not run.get()["y"].any()


# ---------------------------------------------------------------------------------------------------- contexts


def test_shapes_outside_of_the_profile_are_refused() -> None:
    with running() as (run, world):
        for shape in ((5, 8, 3), (1, 7, 3), (1, 8), (0, 8, 3)):
            assert not run.context.set_input_shape("x", shape)
        assert not run.context.set_input_shape("y", (1, 8, 3)) and not run.context.set_tensor_address("z", 0)
        run.shape(1, 9)
        assert not run.enqueue() and "(9,)" in world.messages[-1][1]


def test_what_is_missing_is_named() -> None:
    with running() as (run, world):
        context = run.engine.create_execution_context()
        assert context.infer_shapes() == ["x", "budget", "quota"]
        assert tuple(context.get_tensor_shape("y")) == (-1, -1, 16)
        assert not context.execute_async_v3(int(run.stream)) and "address" in world.messages[-1][1]
        run.context.set_input_shape("x", (1, 8, 3))
        assert run.context.infer_shapes() == ["quota"] and not run.enqueue()
        run.shape(2, 3)
        assert run.context.infer_shapes() == [] and tuple(run.context.get_tensor_shape("y")) == (2, 3, 16)
        assert run.context.get_max_output_size("y") == 2 * 8 * 16 * 4


def test_a_stream_that_nobody_waits_for_has_done_nothing() -> None:
    with running() as (run, _):
        run.shape(1, 4)
        x, quota = inputs(1)
        run.put(x, quota)
        result = run.call("cudaHostAlloc", 256, 0)
        view = np.ctypeslib.as_array((ctypes.c_float * 64).from_address(result))
        assert run.enqueue()
        kind = run.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        run.call("cudaMemcpyAsync", result, run.pointers["y"], 256, kind, run.stream)
        wanted = expected(x, quota, 4)[0].reshape(-1)
        assert not np.array_equal(view, wanted)
        run.call("cudaStreamSynchronize", run.stream)
        np.testing.assert_array_equal(view, wanted)


def test_addresses_must_be_where_they_belong() -> None:
    with running() as (run, _):
        run.shape(4, 8)
        run.put(*inputs(4))
        host = np.zeros(512, np.float32)
        run.context.set_tensor_address("y", host.ctypes.data // 256 * 256)
        with pytest.raises(Misuse, match="unregistered host memory"):
            run.enqueue()
        small = run.call("cudaMalloc", 2044)
        run.context.set_tensor_address("y", small)
        with pytest.raises(Misuse, match="touches 2048 bytes where 2044 are left"):
            run.enqueue()
        with pytest.raises(Misuse, match="not aligned"):
            run.context.set_tensor_address("y", run.pointers["y"] + 4)
        run.context.set_tensor_address("y", run.pointers["y"])
        run.context.set_tensor_address("budget", run.pointers["quota"])
        with pytest.raises(Misuse, match="needs a host address"):
            run.enqueue()


def test_memory_freed_before_the_work_is_done_is_found() -> None:
    with running() as (run, _):
        run.shape(1, 1)
        run.put(*inputs(1))
        executed = run.enqueue()
        executable = run.capture()
        run.call("cudaStreamSynchronize", run.stream)
        run.call("cudaFree", run.pointers["y"])
        run.call("cudaGraphLaunch", executable, run.stream)
        with pytest.raises(Misuse, match="freed"):
            run.call("cudaStreamSynchronize", run.stream)
        assert executed and run.cuda.cudaFree(run.pointers["y"])[0] == run.cuda.cudaError_t.cudaErrorInvalidValue


def test_a_graph_is_stale_after_its_context_changed() -> None:
    with running() as (run, _):
        run.shape(2, 3)
        run.put(*inputs(2))
        assert run.enqueue()
        executable = run.capture()
        run.shape(1, 3)
        with pytest.raises(Misuse, match="got other shapes"):
            run.cuda.cudaGraphLaunch(executable, run.stream)
    with running() as (run, _):
        run.shape(2, 3)
        run.put(*inputs(2))
        assert run.enqueue()
        executable = run.capture()
        run.budget[0] = 4
        assert run.enqueue()
        with pytest.raises(Misuse, match="got other shapes"):
            run.cuda.cudaGraphLaunch(executable, run.stream)
        run.call("cudaStreamSynchronize", run.stream)
        run.context = None
        gc.collect()
        with pytest.raises(Misuse, match="destroyed"):
            run.cuda.cudaGraphLaunch(executable, run.stream)


def test_a_capture_needs_an_execution_before_it() -> None:
    with running() as (run, world):
        run.shape(2, 3)
        run.put(*inputs(2))
        run.call("cudaStreamSynchronize", run.stream)
        run.call("cudaStreamBeginCapture", run.stream, run.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        assert not run.enqueue() and "before it" in world.messages[-1][1]
        error, _ = run.cuda.cudaStreamEndCapture(run.stream)
        assert error == run.cuda.cudaError_t.cudaErrorStreamCaptureInvalidated


def test_two_threads_in_one_context_are_found() -> None:
    with running() as (run, _):
        run.shape(1, 1)
        run.put(*inputs(1))
        found: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(60):
                    run.enqueue()
            except Misuse as error:
                found.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found and "another thread" in str(found[0])


def test_one_context_on_two_streams_at_once_is_found() -> None:
    with running() as (run, _):
        run.shape(1, 1)
        run.put(*inputs(1))
        assert run.enqueue()
        first, second = run.stream, run.call("cudaStreamCreateWithFlags", 1)
        run.stream = second
        with pytest.raises(Misuse, match="two streams use the same execution context"):
            run.enqueue()
        event = run.call("cudaEventCreate")
        run.call("cudaEventRecord", event, first)
        run.call("cudaStreamWaitEvent", second, event, 0)
        assert run.enqueue()  # ordered by the event
        run.call("cudaStreamSynchronize", second)
        run.call("cudaStreamSynchronize", first)
        run.stream = first
        assert run.enqueue()


@every_version
def test_profiles_are_shared_from_ten_on(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        parsed = Parsed(trt)
        parsed.add_profile()
        engine = parsed.engine()  # a second, equal profile
        first, second = engine.create_execution_context(), engine.create_execution_context()
        assert first.active_optimization_profile == 0
        if version != OLD:
            assert second.active_optimization_profile == 0
            return
        assert second.active_optimization_profile == -1 and not second.set_input_shape("x", (1, 8, 3))
        with pytest.raises(RuntimeError, match="Error in set optimization profile async"):
            second.set_optimization_profile_async(0, 0)
        assert second.set_optimization_profile_async(1, 0) and second.set_input_shape("x", (1, 8, 3))
        del first
        assert second.set_optimization_profile_async(0, 0)


def test_profile_sharing_can_be_asked_of_eight() -> None:
    with tensorrt_standin.installed(OLD, gpu=H200) as trt:
        parsed = Parsed(trt)
        parsed.config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        engine = parsed.engine()
        contexts = [engine.create_execution_context() for _ in range(2)]
        assert [item.active_optimization_profile for item in contexts] == [0, 0]


@every_version
def test_a_context_over_memory_of_the_caller(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        engine = Parsed(trt).engine()
        if version == OLD:
            context = engine.create_execution_context_without_device_memory()
            size = engine.device_memory_size
        else:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            size = engine.device_memory_size_v2
        run = Run(engine, context)
        run.shape(1, 1)
        run.put(*inputs(1))
        assert not run.enqueue()
        scratch = run.call("cudaMalloc", size)
        if version == OLD:
            context.device_memory = scratch
        else:
            context.set_device_memory(scratch, size)
        assert run.enqueue()
        run.call("cudaStreamSynchronize", run.stream)


def test_contexts_and_engines_give_their_memory_back() -> None:
    with running() as (run, world):
        before = world.cuda.memory.free_bytes
        context = run.engine.create_execution_context()
        assert world.cuda.memory.free_bytes == before - run.engine.device_memory_size_v2
        del context
        assert world.cuda.memory.free_bytes == before
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu(memory=12_000)) as trt:
        engine = Parsed(trt).engine()
        contexts = [engine.create_execution_context() for _ in range(12)]
        assert contexts[0] is not None and contexts[-1] is None


def test_streamed_weights_leave_the_device() -> None:
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:
        parsed = Parsed(trt)
        parsed.config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        engine = parsed.engine()
        weights, free = engine.streamable_weights_size, tensorrt_standin.current().cuda.memory.free_bytes
        assert engine.weight_streaming_budget_v2 == weights > 0
        engine.weight_streaming_budget_v2 = 100
        assert tensorrt_standin.current().cuda.memory.free_bytes == free + weights - 100
        context = engine.create_execution_context()
        engine.weight_streaming_budget_v2 = 200  # too late
        assert engine.weight_streaming_budget_v2 == 100 and context is not None
    with tensorrt_standin.installed(NEW, gpu=H200) as trt:
        engine = Parsed(trt).engine()
        assert engine.streamable_weights_size == 0 and not hasattr(engine, "weight_streaming_budget")


def test_the_inspector_tells_what_the_verbosity_kept() -> None:
    with tensorrt_standin.installed(NEW, gpu=H200) as trt:
        for verbosity, wanted in (
            ("NONE", '"Layers": []'),
            ("LAYER_NAMES_ONLY", '"project"'),
            ("DETAILED", "LayerType"),
        ):
            parsed = Parsed(trt)
            parsed.config.profiling_verbosity = getattr(trt.ProfilingVerbosity, verbosity)
            inspector = parsed.engine().create_engine_inspector()
            assert wanted in inspector.get_engine_information(trt.LayerInformationFormat.JSON)
