"""Engines and machines that the TensorRT runner refuses, and that TensorRT is not touched then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_standin
from runtime.engines import H200, Foundry, pixels_for
from tensorrt_standin import FakeGpu
from tensorrt_standin.plan import bytes_from_plan, plan_from_bytes

from holov_export.bundle import ENGINES, Bundle, open_bundle
from holov_export.engine import ENGINE, RECORD, read_engine, write_record
from holov_export.errors import (
    BundleError,
    EngineError,
    EnvironmentFaultError,
    HardwareError,
    HolovExportError,
    IntegrityError,
    MissingExtraError,
    UnknownNameError,
    UsageError,
)
from holov_export.gpu import Gpu
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.runtime.session import Session
from holov_export.spec import ModelSpec
from holov_export.storage import sha256_of

VERSION = "10.3.0"
ORIN = FakeGpu(name="Orin", sm=87, memory=64 << 30, integrated=True)


@pytest.fixture
def bundle(foundry: Foundry, exported_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may spoil."""
    built = foundry.bundle_with_engine(exported_bundle.folder, VERSION)
    shutil.copytree(built.folder, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle", verify="size")


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes a Runtime of that module a failure of the test."""

    def spoil(trt: Any) -> None:
        def touched(*arguments: Any) -> None:
            raise AssertionError("trt.Runtime was touched")

        monkeypatch.setattr(trt, "Runtime", touched)

    return spoil


def plan_of(bundle: Bundle) -> Path:
    return bundle.folder / ENGINES / "h200" / ENGINE


def rewritten(bundle: Bundle, change: Callable[[Any], None]) -> None:
    """Change the plan as if another builder had written it: its record fits."""
    path = plan_of(bundle)
    plan = plan_from_bytes(path.read_bytes())
    change(plan)
    path.write_bytes(bytes_from_plan(plan))
    record = read_engine(path.parent).record
    update = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    write_record(path.parent, record.model_copy(update=update))


# ------------------------------------------------------------------------------------------- before TensorRT is touched


def test_no_gpu(bundle: Bundle) -> None:
    """The stand-in's Runtime without a driver is an AssertionError; the real one kills the process."""
    with (
        tensorrt_standin.installed(VERSION, gpu=None),
        pytest.raises(HardwareError, match="no usable NVIDIA GPU") as no,
    ):
        TrtRunner(bundle)
    assert no.value.exit_code == 3


def test_no_tensorrt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holov_export.gpu.probe", lambda: Gpu("NVIDIA H200", 90, 1 << 37, False, "12.6"))
    with pytest.raises(MissingExtraError, match=r"'tensorrt' is not installed.*holov-export\[tensorrt\]"):
        TrtRunner(bundle)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, r"vision\.engine of '.+' has \d+ bytes, its record says \d+"),
        (flipped, r"vision\.engine of '.+' differs from its sha256"),
        (Path.unlink, r"vision\.engine is missing"),
    ],
)
def test_a_changed_plan(
    bundle: Bundle, untouchable: Callable[[Any], None], spoil: Callable[[Path], None], message: str
) -> None:
    spoil(plan_of(bundle))
    with tensorrt_standin.installed(VERSION, gpu=H200) as trt:
        untouchable(trt)
        with pytest.raises(IntegrityError, match=message) as caught:
            TrtRunner(bundle)
        assert caught.value.exit_code == 1
        if spoil is not flipped:  # the size alone tells
            with pytest.raises(IntegrityError, match=message):
                TrtRunner(bundle, verify="size")


def test_a_flipped_bit_that_nobody_looked_for_is_refused_by_tensorrt(bundle: Bundle) -> None:
    flipped(plan_of(bundle))
    with (
        tensorrt_standin.installed(VERSION, gpu=H200),
        pytest.raises(EngineError, match=r"does not deserialise the plan \(engine 'h200'\): .*Serialization"),
    ):
        TrtRunner(bundle, verify="size")


@pytest.mark.parametrize("named", [None, "h200"])
def test_an_engine_for_another_gpu(bundle: Bundle, untouchable: Callable[[Any], None], named: str | None) -> None:
    with tensorrt_standin.installed(VERSION, gpu=ORIN) as trt:
        untouchable(trt)
        wanted = r"'h200' was built on NVIDIA H200 \(sm_90\), this GPU is Orin \(sm_87\).*holov-export compile"
        with pytest.raises(EngineError, match=wanted) as caught:
            TrtRunner(bundle, target=named)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3", "11.4.0"])
def test_an_engine_of_another_tensorrt(bundle: Bundle, untouchable: Callable[[Any], None], version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        untouchable(trt)
        with pytest.raises(EngineError, match=f"built by TensorRT 10.3.0, this machine has {version}"):
            TrtRunner(bundle)


def test_an_engine_of_another_graph(
    bundle: Bundle, foundry: Foundry, half_bundle: Bundle, untouchable: Callable[[Any], None]
) -> None:
    foreign = foundry.bundle_with_engine(half_bundle.folder, VERSION).folder / ENGINES / "h200"
    with tensorrt_standin.installed(VERSION, gpu=H200) as trt:
        untouchable(trt)
        with pytest.raises(EngineError, match="built from another graph than this bundle's"):
            TrtRunner(bundle, engine=foreign)


def test_a_record_that_does_not_parse(bundle: Bundle) -> None:
    (bundle.folder / ENGINES / "h200" / RECORD).write_text('{"schema_version": 1}')
    with (
        tensorrt_standin.installed(VERSION, gpu=H200),
        pytest.raises(IntegrityError, match=r"engine\.json' does not parse: target: "),
    ):
        TrtRunner(bundle)


# ------------------------------------------------------------------------------------------------------------- choice


def test_a_bundle_without_engines(exported_bundle: Bundle) -> None:
    with tensorrt_standin.installed(VERSION, gpu=H200):
        with pytest.raises(EngineError, match=r"'exported' has no engine. Build one: holov-export compile .*TARGET"):
            TrtRunner(exported_bundle)
        with pytest.raises(BundleError, match="holds no engine"):
            TrtRunner(exported_bundle, engine=exported_bundle.folder / "nothing")


def test_the_engine_that_fits_is_chosen(bundle: Bundle) -> None:
    folder = bundle.folder / ENGINES
    shutil.copytree(folder / "h200", folder / "orin")
    record = read_engine(folder / "orin").record
    built = record.built_with.model_copy(update={"sm": 87, "gpu": "Orin"})
    write_record(folder / "orin", record.model_copy(update={"target": "orin", "built_with": built}))
    with tensorrt_standin.installed(VERSION, gpu=H200), TrtRunner(bundle) as runner:
        assert runner.engine.record.target == "h200"
    with tensorrt_standin.installed(VERSION, gpu=replace(H200, name="NVIDIA L4", sm=89)):
        wanted = r"no engine of the bundle fits: .*'h200' was built on NVIDIA H200.*'orin' was built on Orin \(sm_87\)"
        with pytest.raises(EngineError, match=wanted):
            TrtRunner(bundle)
    with tensorrt_standin.installed(VERSION, gpu=H200), pytest.raises(EngineError, match="for 'l4'; it has h200, orin"):
        TrtRunner(bundle, target="l4")


def test_several_engines_that_fit(bundle: Bundle) -> None:
    folder = bundle.folder / ENGINES
    shutil.copytree(folder / "h200", folder / "mine")
    record = read_engine(folder / "mine").record
    write_record(folder / "mine", record.model_copy(update={"target": "mine"}))
    with tensorrt_standin.installed(VERSION, gpu=H200):
        with pytest.raises(EngineError, match=r"several engines fit .*: h200, mine. Choose one with --target"):
            TrtRunner(bundle)
        with TrtRunner(bundle, target="mine") as runner:
            assert runner.engine.folder.name == "mine"


def test_engines_by_name(bundle: Bundle) -> None:
    with pytest.raises(UnknownNameError, match=r"'tflite'.*ort, tensorrt"):
        runner_from_bundle(bundle, engine="tflite")
    with pytest.raises(UsageError, match="no target's engine"):
        Session.open(bundle, decoder="none", target="h200", provider="cpu")
    with pytest.raises(UnknownNameError, match=r"memory 'hbm'.*auto, cuda-python, torch"):  # noqa: SIM117
        with tensorrt_standin.installed(VERSION, gpu=H200):
            TrtRunner(bundle, memory="hbm")


# ------------------------------------------------------------------------------------ plans that are not their record


def other_profiles(plan: Any) -> None:
    for name, allowed in plan.profiles[0].items():
        plan.profiles[0][name] = replace(allowed, high=(2, *allowed.high[1:]))


def no_saliency(plan: Any) -> None:
    plan.bindings = [item for item in plan.bindings if item.name != "saliency"]


def budget_as_data(plan: Any) -> None:
    next(item for item in plan.bindings if item.name == "budget").host = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_profiles, r"names batch 1\.\.3 at budget 1\.\.64, its plan has the batches \(1, 1, 2\)"),
        (
            no_saliency,
            "has the tensors pixel_values, budget, quota, visual_tokens, positions, counts; expected .*saliency",
        ),
        (budget_as_data, "takes the budget as data, not as a shape value"),
    ],
)
def test_a_plan_that_is_not_its_record(bundle: Bundle, change: Callable[[Any], None], message: str) -> None:
    rewritten(bundle, change)
    with tensorrt_standin.installed(VERSION, gpu=H200):
        with pytest.raises(EngineError, match=message):
            TrtRunner(bundle)
        assert tensorrt_standin.current().leaked() == []


def test_a_budget_that_tensorrt_wants_as_a_value_and_as_data(
    foundry: Foundry, exported_bundle: Bundle, llava_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may then say that the tensor is on the device; pinned memory serves both."""
    bundle = foundry.bundle_with_engine(exported_bundle.folder, "8.6.0")
    with tensorrt_standin.installed("8.6.0", gpu=H200):
        world = tensorrt_standin.current()
        kind = world.classes["ICudaEngine"]
        monkeypatch.setattr(kind, "get_tensor_location", lambda self, name: world.enum("TensorLocation", "DEVICE"))
        with TrtRunner(bundle) as runner:
            assert runner.run(pixels_for(llava_spec, 1), 7).counts.tolist() == [7]


def test_shapes_that_tensorrt_refuses_by_raising(
    bundle: Bundle, llava_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> list[str]:
        raise RuntimeError("infer_shapes error code: -1")  # what the bindings of 8.6 do

    with tensorrt_standin.installed(VERSION, gpu=H200), TrtRunner(bundle) as runner:
        monkeypatch.setattr(tensorrt_standin.current().classes["IExecutionContext"], "infer_shapes", refuse)
        with pytest.raises(EngineError, match="cannot tell the shapes of 1 images at budget 7"):
            runner.run(pixels_for(llava_spec, 1), 7)


def test_an_engine_of_tensorrt_8_without_profile_sharing(
    foundry: Foundry, exported_bundle: Bundle, tmp_path: Path, llava_spec: ModelSpec
) -> None:
    """It has one context: runs go without CUDA graphs, and a second lane is refused."""
    built = foundry.bundle_with_engine(exported_bundle.folder, "8.6.0")
    shutil.copytree(built.folder, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle", verify="size")
    rewritten(bundle, lambda plan: setattr(plan, "profile_sharing", False))
    pixels = pixels_for(llava_spec, 1)
    with tensorrt_standin.installed("8.6.0", gpu=H200):
        world = tensorrt_standin.current()
        with TrtRunner(bundle) as runner:
            first = runner.run(pixels, 8)
            with pytest.warns(RuntimeWarning, match="CUDA graphs are off.*chosen by another IExecutionContext"):
                second = runner.run(pixels, 8)
            np.testing.assert_array_equal(first.tokens, second.tokens)
            with runner._pool.lane(), pytest.raises(EngineError, match="does not switch to profile 0"):
                runner.run(pixels, 8)
            runner.run(pixels, 8)
        assert world.leaked() == []


def test_a_stripped_engine_on_a_tensorrt_that_cannot_fill_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    record = read_engine(bundle.folder / ENGINES / "h200").record
    built = record.built_with.model_copy(update={"stripped": True})
    write_record(bundle.folder / ENGINES / "h200", record.model_copy(update={"built_with": built}))
    with tensorrt_standin.installed(VERSION, gpu=H200) as trt:
        monkeypatch.delattr(trt, "OnnxParserRefitter")
        with pytest.raises(EngineError, match=r"built without its weights.*without stripping"):
            TrtRunner(bundle)


def test_a_weight_budget_without_weight_streaming(bundle: Bundle, foundry: Foundry, exported_bundle: Bundle) -> None:
    with tensorrt_standin.installed(VERSION, gpu=H200), pytest.raises(EngineError, match="without weight streaming"):
        TrtRunner(bundle, weight_budget=0)
    old = foundry.bundle_with_engine(exported_bundle.folder, "8.6.0")
    with tensorrt_standin.installed("8.6.0", gpu=H200), pytest.raises(EngineError, match="without weight streaming"):
        TrtRunner(old, weight_budget=0)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("room", [0, 1000, 100_000, 400_000, 600_000])
def test_too_little_device_memory(bundle: Bundle, room: int) -> None:
    """However far the allocations come, the message says how much was asked and left, and nothing leaks."""
    with tensorrt_standin.installed(VERSION, gpu=H200), TrtRunner(bundle) as runner:
        weights = runner.device_memory.engine
        assert runner.device_memory.lanes > 600_000
    with tensorrt_standin.installed(VERSION, gpu=replace(H200, memory=weights + room)):
        world = tensorrt_standin.current()
        with pytest.raises(
            EnvironmentFaultError, match=r"out of memory: [\d.]+ MiB asked for, [\d.]+ MiB free"
        ) as full:
            TrtRunner(bundle)
        assert full.value.exit_code == 3
        assert "smaller batch" in full.value.hint
        assert world.leaked() == []


def test_no_memory_for_a_second_lane(bundle: Bundle, llava_spec: ModelSpec) -> None:
    pixels = pixels_for(llava_spec, 1)
    with tensorrt_standin.installed(VERSION, gpu=H200), TrtRunner(bundle) as runner:
        used = runner.device_memory.engine + runner.device_memory.lanes
    with tensorrt_standin.installed(VERSION, gpu=replace(H200, memory=used + 1000)), TrtRunner(bundle) as runner:
        with runner._pool.lane(), pytest.raises(EnvironmentFaultError, match="out of memory"):
            runner.run(pixels, 8)
        assert runner.run(pixels, 8).counts.tolist() == [8]


def test_neither_cuda_python_nor_a_torch_with_cuda(bundle: Bundle) -> None:
    with tensorrt_standin.installed(VERSION, gpu=H200, cuda_python=None):
        for memory, kind in (
            ("auto", MissingExtraError),
            ("cuda-python", MissingExtraError),
            ("torch", HolovExportError),
        ):
            with pytest.raises(kind, match=r"cuda-bindings|has no CUDA") as caught:
                TrtRunner(bundle, memory=memory)
            assert caught.value.exit_code == 3
            assert "pip install cuda-bindings" in caught.value.hint
