"""The trtexec command: every option exists in that trtexec, and says what the plan says.

trtexec_options.tsv: which options the parser of samples/common/sampleOptions.cpp takes, at the tags of
github.com/NVIDIA/TensorRT that the columns name. Facts only.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from holov_export.compile.compilation import CompileOptions, CompilePlan, plan_from_target
from holov_export.compile.lowering import lowered_for
from holov_export.compile.preview import previews
from holov_export.compile.trtexec import LayerPins, pins_from_graph, trtexec_from_plan
from holov_export.errors import EngineError
from holov_export.policies import HolovPolicy
from holov_export.spec import OPSETS, CheckpointSource, ExportPlan, ModelSpec, Precision
from holov_export.targets import EngineTarget, VersionRange, target_from_name

ExportedGraph = Callable[[str, Precision], Path]
COLUMNS = ("8.5.2", "8.6.1", "10.0.1", "10.3.0", "10.13.3", "10.16", "11.0", "11.1")
ONNX = Path("bundle/vision.onnx")
PORTABLE = {"version_compatible": True, "refit": True}
EVERYTHING = {
    **PORTABLE,
    "weight_streaming": True,
    "strip_plan": True,
    "hardware_compatibility": "ampere_plus",
    "tf32": True,
    "batch": "1:2:4",
}


@pytest.fixture(scope="module")
def target() -> EngineTarget:
    """The H200 with every TensorRT there is."""
    return target_from_name("h200").model_copy(update={"tensorrt": VersionRange(min="8.5", max="11.4")})


def options_of(version: str) -> set[str]:
    with (Path(__file__).parent / "trtexec_options.tsv").open(encoding="utf-8", newline="") as stream:
        return {row["option"] for row in csv.DictReader(stream, delimiter="\t") if row[version] == "y"}


def export_plan(model: ModelSpec, precision: Precision) -> ExportPlan:
    return ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name="tiny"),
        policy=HolovPolicy(),
        precision=precision,
        decoder=None,
        opset=OPSETS[precision],
    )


def plan_for(
    model: ModelSpec, target: EngineTarget, version: str, precision: Precision, **settings: object
) -> CompilePlan:
    return plan_from_target(export_plan(model, precision), target, CompileOptions(**settings), version)  # type: ignore[arg-type]


def names(arguments: tuple[str, ...]) -> list[str]:
    return [argument.partition("=")[0] for argument in arguments[1:]]


def value(arguments: tuple[str, ...], name: str) -> str:
    return next(item.partition("=")[2] for item in arguments if item.startswith(f"{name}="))


@pytest.mark.parametrize("version", COLUMNS)
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("settings", [{}, PORTABLE, EVERYTHING], ids=["plain", "portable", "everything"])
def test_every_option_exists_in_that_trtexec(
    version: str, precision: Precision, settings: dict[str, object], target: EngineTarget, llava_spec: ModelSpec
) -> None:
    try:
        plan = plan_for(llava_spec, target, version, precision, **settings)
    except EngineError:
        assert version.startswith("8.")  # no bfloat16, no streaming, nothing portable in 8.5
        assert settings or precision is Precision.BF16
        return
    pins = LayerPins("a:fp32", "a:fp32") if plan.network == "fp16-flag" else None
    made = trtexec_from_plan(plan, ONNX, pins=pins, timing_cache=Path("h200.cache"))
    unknown = set(names(made.arguments)) - options_of(version)
    assert not unknown


def test_the_list_of_options_tells_versions_apart() -> None:
    assert "--fp16" in options_of("10.16")
    assert "--fp16" not in options_of("11.0")
    assert "--skipInference" not in options_of("8.5.2")
    assert "--stronglyTyped" not in options_of("8.6.1")


def test_tensorrt_8_gets_the_flag_and_the_layers_to_keep(
    target: EngineTarget, llava_spec: ModelSpec, exported_graph: ExportedGraph
) -> None:
    plan = plan_for(llava_spec, target, "8.6.1", Precision.FP16)
    path = exported_graph("holov", Precision.FP16) / "vision.onnx"
    graph = lowered_for(onnx.load(str(path), load_external_data=False), "8.6.1")
    made = trtexec_from_plan(plan, ONNX, pins=pins_from_graph(graph))
    assert "--fp16" in made.arguments
    assert "--precisionConstraints=obey" in made.arguments
    precisions = dict(item.rsplit(":", 1) for item in value(made.arguments, "--layerPrecisions").split(","))
    outputs = dict(item.rsplit(":", 1) for item in value(made.arguments, "--layerOutputTypes").split(","))
    by_name = {node.name: node for node in graph.graph.node}
    assert set(precisions.values()) == {"fp32"}
    assert set(outputs) <= set(precisions) <= set(by_name)
    softmaxes = {name for name in precisions if by_name[name].op_type == "Softmax"}
    assert len(softmaxes) == 1  # that of the CLS row; the tower's are half
    assert not any("mlp" in name or "layer_norm" in name or "projector" in name for name in precisions)
    for name, types in outputs.items():
        assert types == ("fp32+int32" if by_name[name].op_type == "TopK" else "fp32")
    assert any(by_name[name].op_type == "Greater" for name in set(precisions) - set(outputs))


def test_layer_names_do_not_break_the_lists(exported_graph: ExportedGraph) -> None:
    path = exported_graph("holov", Precision.FP16) / "vision.onnx"
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        assert not set(node.name) & set(",:'\" ")


def test_tensorrt_10_is_strongly_typed_and_11_is_so_by_itself(target: EngineTarget, llava_spec: ModelSpec) -> None:
    ten = trtexec_from_plan(plan_for(llava_spec, target, "10.3.0", Precision.FP16), ONNX).arguments
    eleven = trtexec_from_plan(plan_for(llava_spec, target, "11.1", Precision.FP16), ONNX).arguments
    assert "--stronglyTyped" in ten
    assert "--fp16" not in ten
    assert not {"--stronglyTyped", "--fp16"} & set(eleven)


def test_shapes_are_those_of_the_profiles(target: EngineTarget, llava_spec: ModelSpec) -> None:
    plan = plan_for(llava_spec, target, "10.3.0", Precision.FP32, batch="1:4:16", budget="1:7:64")
    made = trtexec_from_plan(plan, ONNX).arguments
    side = llava_spec.vision.image_size
    assert value(made, "--minShapes") == f"pixel_values:1x3x{side}x{side},quota:1,budget:1"
    assert value(made, "--optShapes") == f"pixel_values:4x3x{side}x{side},quota:4,budget:7"
    assert value(made, "--maxShapes") == f"pixel_values:16x3x{side}x{side},quota:16,budget:64"
    assert "--profile" not in names(made)


def test_several_profiles_are_numbered_before_their_shapes(target: EngineTarget, llava_spec: ModelSpec) -> None:
    made = names(trtexec_from_plan(plan_for(llava_spec, target, "10.3.0", Precision.FP32), ONNX).arguments)
    start = made.index("--profile")
    assert made[start : start + 8] == ["--profile", "--minShapes", "--optShapes", "--maxShapes"] * 2


def test_tensorrt_8_builds_one_profile_and_says_so(target: EngineTarget, llava_spec: ModelSpec) -> None:
    made = trtexec_from_plan(plan_for(llava_spec, target, "8.6.1", Precision.FP32), ONNX)
    assert names(made.arguments).count("--minShapes") == 1
    assert any("one profile" in note for note in made.notes)


def test_memory_level_and_tf32(target: EngineTarget, llava_spec: ModelSpec) -> None:
    plan = plan_for(llava_spec, target, "10.3.0", Precision.FP16, workspace_mb=512, optimization_level=5)
    made = trtexec_from_plan(plan, ONNX).arguments
    assert value(made, "--memPoolSize") == "workspace:512"
    assert value(made, "--builderOptimizationLevel") == "5"
    assert "--noTF32" in made
    loose = trtexec_from_plan(plan_for(llava_spec, target, "10.3.0", Precision.FP16, tf32=True), ONNX).arguments
    assert "--noTF32" not in loose


def test_a_path_with_a_space_is_one_word_of_the_shell(target: EngineTarget, llava_spec: ModelSpec) -> None:
    plan = plan_for(llava_spec, target, "10.3.0", Precision.FP16)
    made = trtexec_from_plan(plan, Path("my bundle/vision.onnx")).arguments
    assert "--onnx=my bundle/vision.onnx" in shlex.split(shlex.join(made))


def test_a_preview_covers_every_kind_of_network(llava_spec: ModelSpec, exported_graph: ExportedGraph) -> None:
    folder = exported_graph("holov", Precision.FP16)
    made = previews(export_plan(llava_spec, Precision.FP16), folder, target_from_name("h200"), CompileOptions())
    assert [item.plan.network for item in made if item.plan] == ["fp16-flag", "strongly-typed", "strongly-typed"]
    lower, command = made[0].commands
    assert lower[:2] == ("holov-export", "lower")
    assert f"--onnx={lower[-1]}/vision.onnx" in command
    assert all(len(item.commands) == 1 for item in made[1:])


def test_a_preview_says_which_versions_cannot(llava_spec: ModelSpec, tmp_path: Path) -> None:
    made = previews(export_plan(llava_spec, Precision.BF16), tmp_path, target_from_name("h200"), CompileOptions())
    assert made[0].plan is None
    assert "bf16" in made[0].refusal
    assert all(item.plan for item in made[1:])


def test_a_preview_of_what_nothing_can_build_is_an_error(llava_spec: ModelSpec) -> None:
    with pytest.raises(EngineError, match="bf16"):
        previews(export_plan(llava_spec, Precision.BF16), Path(), target_from_name("h200"), CompileOptions(), "8.6")


def test_before_the_export_the_layers_have_no_names(
    target: EngineTarget, llava_spec: ModelSpec, tmp_path: Path
) -> None:
    export = export_plan(llava_spec, Precision.FP16)
    (made,) = previews(export, tmp_path, target_from_name("h200"), CompileOptions(), "8.6.0")
    assert "--fp16" in made.commands[-1]
    assert "--layerPrecisions" not in names(made.commands[-1])
    assert any("--layerPrecisions" in note for note in made.notes)
