"""Plans, the choice of a target, builder memory: what is decided before TensorRT is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_standin
from tensorrt_standin import FakeGpu

from holov_export.compile.builder_config import workspace_bytes
from holov_export.compile.compilation import CompileOptions, branches_of, engine_folder, plan_from_target
from holov_export.compile.machine import this_machine
from holov_export.compile.target_choice import target_for
from holov_export.errors import EngineError, HardwareError, MissingExtraError
from holov_export.gpu import Gpu
from holov_export.policies import HolovPolicy
from holov_export.spec import OPSETS, CheckpointSource, ExportPlan, ModelSpec, Precision
from holov_export.targets import VersionRange, list_targets, target_from_name

H200 = target_from_name("h200")


@pytest.fixture
def export(llava_spec: ModelSpec) -> ExportPlan:
    return plan_of(llava_spec, Precision.FP16)


def plan_of(model: ModelSpec, precision: Precision) -> ExportPlan:
    return ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name="tiny"),
        policy=HolovPolicy(),
        precision=precision,
        decoder=None,
        opset=OPSETS[precision],
    )


def gpu(name: str, sm: int, gib: float, *, integrated: bool = False) -> Gpu:
    return Gpu(name, sm, int(gib * 2**30), integrated, "12.6")


@pytest.mark.parametrize(
    ("tensorrt", "precision", "network", "opset", "lowered"),
    [
        ("8.6.0", Precision.FP16, "fp16-flag", 17, True),
        ("8.6.0", Precision.FP32, "fp32", 17, True),
        ("10.3.0", Precision.FP16, "strongly-typed", 18, False),
        ("10.13.3", Precision.FP32, "strongly-typed", 18, False),
        ("11.4.0", Precision.BF16, "strongly-typed", 22, False),
    ],
)
def test_three_kinds_of_network(
    tensorrt: str, precision: Precision, network: str, opset: int, lowered: bool, llava_spec: ModelSpec
) -> None:
    plan = plan_from_target(plan_of(llava_spec, precision), H200, CompileOptions(), tensorrt)
    assert (plan.network, plan.opset, plan.lowered) == (network, opset, lowered)


def test_8_5_is_lowered_even_from_opset_17_and_has_no_levels(export: ExportPlan) -> None:
    target = target_from_name("jetson-agx-orin-64gb-jetpack5")
    plan = plan_from_target(export.model_copy(update={"opset": 17}), target, CompileOptions(), "8.5.2")
    assert plan.lowered
    assert plan.optimization_level is None


def test_the_user_s_word_goes_before_the_target_s(export: ExportPlan) -> None:
    plan = plan_from_target(export, H200, CompileOptions(), "10.3.0")
    assert (plan.workspace_mb, plan.optimization_level) == (H200.workspace_mb, H200.optimization_level)
    options = CompileOptions(workspace_mb=99, optimization_level=0, refit=True)
    plan = plan_from_target(export, H200, options, "10.3.0")
    assert (plan.workspace_mb, plan.optimization_level, plan.flags.refit) == (99, 0, True)


def test_precisions_that_the_target_lacks_are_refused(export: ExportPlan) -> None:
    target = H200.model_copy(update={"precisions": ("fp32", "int8")})
    with pytest.raises(EngineError, match=r"fp32, int8; the bundle is fp16") as caught:
        plan_from_target(export, target, CompileOptions(), "10.3.0")
    assert "--fp32" in caught.value.hint


def test_bfloat16_needs_its_hardware(llava_spec: ModelSpec) -> None:
    old = H200.model_copy(update={"sm": 75})
    with pytest.raises(EngineError, match="sm_75 has no bfloat16"):
        plan_from_target(plan_of(llava_spec, Precision.BF16), old, CompileOptions(), "10.13.3")


def test_a_jetson_builds_for_itself_only(export: ExportPlan) -> None:
    target = target_from_name("jetson-agx-orin-64gb")
    with pytest.raises(EngineError, match="JetPack"):
        plan_from_target(export, target, CompileOptions(hardware_compatibility="ampere_plus"), "10.3.0")


@pytest.mark.parametrize(
    ("low", "high", "branches"),
    [
        ("8.6", "11.4", ("8.6", "10.0", "11.0")),
        ("8.6.2", "8.6.2", ("8.6.2",)),
        ("10.3", "10.3", ("10.3",)),
        ("10.13", "11.4", ("10.13", "11.0")),
        ("8.6", "10.0", ("8.6", "10.0")),
    ],
)
def test_branches_of_a_range(low: str, high: str, branches: tuple[str, ...]) -> None:
    target = H200.model_copy(update={"tensorrt": VersionRange(min=low, max=high)})
    assert branches_of(target) == branches
    assert all(target.tensorrt.holds(version) for version in branches)


def test_where_an_engine_goes() -> None:
    assert engine_folder(Path("b"), "h200", CompileOptions()) == Path("b/engines/h200")
    assert engine_folder(Path("b"), "h200", CompileOptions(output=Path("e"))) == Path("e/h200")


# -------------------------------------------------------------------------------------------- target auto


@pytest.mark.parametrize(
    ("found", "tensorrt", "target"),
    [
        (gpu("NVIDIA H200", 90, 139.8), "8.6.0", "h200"),
        (gpu("NVIDIA H100 80GB HBM3", 90, 79.6), "10.16.1", "h100"),
        (gpu("NVIDIA A100-SXM4-80GB", 80, 79.3), "10.3.0", "a100-80gb"),
        (gpu("NVIDIA L4", 89, 22.5), "10.3.0", "l4"),
        (gpu("NVIDIA L40S", 89, 44.5), "10.3.0", "l40s"),
        (gpu("NVIDIA GeForce RTX 4090", 89, 23.6), "10.3.0", "rtx-4090"),
        (gpu("Orin", 87, 61.3), "10.3.0.30", "jetson-agx-orin-64gb"),
        (gpu("Orin", 87, 61.3), "8.6.2", "jetson-agx-orin-64gb-jetpack6.0"),
        (gpu("Orin", 87, 61.3), "10.13.3", "jetson-agx-orin-64gb-jetpack7.2"),
        (gpu("Orin", 87, 29.8), "10.3.0", "jetson-agx-orin-32gb"),
        (gpu("Orin", 87, 15.3), "10.3.0", "jetson-orin-nx-16gb"),
        (gpu("Orin", 87, 7.4), "10.3.0", "jetson-orin-nano-8gb"),
        (gpu("NVIDIA Thor", 110, 122.8), "10.13.3", "jetson-agx-thor"),
    ],
)
def test_the_target_of_a_gpu(found: Gpu, tensorrt: str, target: str) -> None:
    choice = target_for(found, tensorrt, list_targets())
    assert choice.target.name == target
    assert found.name in choice.reason


def test_an_unknown_gpu_needs_a_file_of_its_own() -> None:
    with pytest.raises(EngineError, match=r"RTX 3090 \(sm_86") as caught:
        target_for(gpu("NVIDIA GeForce RTX 3090", 86, 24), "10.3.0", list_targets())
    assert "board.toml" in caught.value.hint


def test_a_tensorrt_that_no_target_of_the_gpu_runs() -> None:
    with pytest.raises(EngineError, match=r"runs TensorRT 9\.3.*jetson-orin-nano-8gb: 10\.3"):
        target_for(gpu("Orin", 87, 61.3), "9.3", list_targets())


# -------------------------------------------------------------------------------------------- the machine


def test_no_gpu_comes_before_no_tensorrt() -> None:
    with tensorrt_standin.installed("10.3.0", gpu=None), pytest.raises(HardwareError):
        this_machine()


def test_no_tensorrt_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()), monkeypatch.context() as gone:
        gone.delitem(sys.modules, "tensorrt")
        gone.setattr(sys, "path", [])
        with pytest.raises(MissingExtraError) as caught:
            this_machine()
    assert "holov-export[tensorrt]" in caught.value.hint


def test_a_tensorrt_without_its_libraries_is_a_hardware_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import holov_export.compile.machine as machine

    def fail(module: str) -> None:
        raise ImportError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setattr(machine, "require", fail)
    with (
        tensorrt_standin.installed("8.6.0", gpu=FakeGpu()),
        pytest.raises(HardwareError, match=r"libcublas\.so\.12"),
    ):
        this_machine()


def test_builder_memory_is_what_there_is(export: ExportPlan, tmp_path: Path) -> None:
    plan = plan_from_target(export, H200, CompileOptions(workspace_mb=4096), "10.3.0")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable: 1000 kB\n", encoding="ascii")
    assert workspace_bytes(plan, gpu("big", 90, 80), meminfo) == 4096 * 2**20
    assert workspace_bytes(plan, gpu("small", 90, 2), meminfo) == 2 * 2**30
    assert workspace_bytes(plan, gpu("Orin", 87, 8, integrated=True), meminfo) == 1000 * 1024
    assert workspace_bytes(plan, gpu("Orin", 87, 2, integrated=True), tmp_path / "none") == 2 * 2**30
