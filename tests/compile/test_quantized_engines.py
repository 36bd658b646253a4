"""Bundles with Q/DQ graphs: what TensorRT is given, flags and pins, the record, and what is refused before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tensorrt_standin
from engine_bundles import bundle_around, family_bundle
from quantized_graphs import FP8, INT8, quantization_of, quantized_bundle
from tensorrt_standin import VERSIONS, FakeGpu

from holov_export.bundle import Bundle
from holov_export.compile.compilation import CompileOptions, plan_from_target
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.compile.float_weights import float_bytes
from holov_export.compile.graph_file import graph_from_file, write_lowered
from holov_export.compile.lowering import lowered_for, opset_of
from holov_export.compile.precision_pins import element_types, float32_nodes
from holov_export.compile.preview import previews
from holov_export.compile.readiness import readiness_of
from holov_export.engine import engines_in
from holov_export.errors import EngineError, IntegrityError, StorageError
from holov_export.quantize.cpu import write_quantized_cpu
from holov_export.quantize.linears import linears_of
from holov_export.quantize.qdq import write_quantized
from holov_export.quantize.ranges import Ranges, RangesRecord, TensorRange
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.spec import CheckpointSource, ExportPlan, ModelSpec, Precision, Quantization, QuantizedType
from holov_export.spec import opset_of as opset_of_plan
from holov_export.targets import EngineTarget, list_targets, target_from_name
from holov_export.tensors import PixelBatch

ExportedGraph = Callable[[str, Precision], Path]
Bundles = Callable[[Precision, QuantizedType], Bundle]
TARGET = target_from_name("h200")
ORIN = target_from_name("jetson-agx-orin-64gb")
EIGHT = ("8.6.0",)
TYPED = tuple(version for version in VERSIONS if version not in EIGHT)


@pytest.fixture(scope="module")
def bundles(exported_graph: ExportedGraph, llava_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """(precision, type) -> a quantised bundle; compile it with an output folder of the test's own."""
    made: dict[tuple[Precision, QuantizedType], Bundle] = {}

    def make(precision: Precision, kind: QuantizedType) -> Bundle:
        if (precision, kind) not in made:
            folder = tmp_path_factory.mktemp("quantised")
            plain = bundle_around(exported_graph("holov", precision), folder / "plain", llava_spec, precision)
            made[precision, kind] = quantized_bundle(plain, folder / "bundle", kind)
        return made[precision, kind]

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan_of(model: ModelSpec, precision: Precision, quantization: Quantization) -> ExportPlan:
    from holov_export.policies import HolovPolicy

    return ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name="tiny"),
        policy=HolovPolicy(),
        precision=precision,
        quantization=quantization,
        decoder=None,
        opset=opset_of_plan(precision, quantization),
    )


def outputs_of(path: Path, pixels: PixelBatch, budget: int, quota: list[int]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    feeds = {"pixel_values": pixels.pixel_values.astype(kind), "budget": np.array([budget]), "quota": np.array(quota)}
    found: list[np.ndarray] = session.run(["visual_tokens", "positions", "counts"], feeds)
    return found


def pictures(count: int) -> PixelBatch:
    return PixelBatch(np.random.default_rng(3).standard_normal((count, 3, 56, 56)).astype(np.float32), (), ())


def last_build() -> tensorrt_standin.Build:
    return tensorrt_standin.current().builds[-1]


# ---------------------------------------------------------------------------------------------------- every version


BUILT = [(Precision.FP32, INT8, version) for version in VERSIONS]
BUILT += [(Precision.FP16, kind, version) for kind in (INT8, FP8) for version in TYPED]


@pytest.mark.parametrize(("precision", "kind", "version"), BUILT)
def test_an_engine_computes_what_the_graph_says(
    precision: Precision, kind: QuantizedType, version: str, bundles: Bundles, tmp_path: Path
) -> None:
    bundle, pixels = bundles(precision, kind), pictures(3)
    tokens, positions, counts = outputs_of(bundle.vision, pixels, 9, [9, 5, 1])
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine = engine_from_bundle(bundle, TARGET, CompileOptions(output=tmp_path / "engines"))
        build = last_build()
        with TrtRunner(bundle, engine=engine.folder) as runner:
            found = runner.run(pixels, 9, [9, 5, 1])
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_allclose(found.tokens, tokens, atol=1e-6 if precision is Precision.FP32 else 1e-3)
    assert build.strongly_typed == (version in TYPED)
    assert ({"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"} <= build.flags) == (version in EIGHT)
    assert "FP8" not in build.flags and "TF32" not in build.flags
    assert bool(build.pinned) == (version in EIGHT)


def test_the_record_says_what_is_quantised(bundles: Bundles, tmp_path: Path) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        options = CompileOptions(output=tmp_path, prefer=True)
        engine_from_bundle(bundles(Precision.FP32, INT8), TARGET, options)
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        typed = engine_from_bundle(bundles(Precision.FP16, FP8), TARGET, CompileOptions(output=tmp_path / "typed"))
    (found,) = engines_in(tmp_path)[:1]
    assert (found.record.precision_name, found.record.quantized) == ("int8", INT8)
    assert (found.record.built_with.network, found.record.opset) == ("int8-flag, pins preferred", 17)
    assert typed.record.precision_name == "fp16-fp8"
    assert (typed.record.built_with.network, typed.record.opset) == ("strongly-typed", 19)


def test_records_of_before_quantisation_are_read(bundles: Bundles, tmp_path: Path) -> None:
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine = engine_from_bundle(bundles(Precision.FP16, INT8), TARGET, CompileOptions(output=tmp_path))
    path = engine.folder / "engine.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["schema_version"], record["quantized"]) == (3, "int8")
    del record["quantized"]
    path.write_text(json.dumps({**record, "schema_version": 2}), encoding="utf-8")
    (found,) = engines_in(tmp_path)
    assert (found.record.quantized, found.record.precision_name) == (None, "fp16")


# ------------------------------------------------------------------------------------------------------- TensorRT 8


def test_stored_weights_become_floats_for_tensorrt_8_only(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles(Precision.FP32, INT8)
    for version in ("8.6.0", "10.3.0"):
        said: list[str] = []
        with tensorrt_standin.installed(version, gpu=FakeGpu()):
            engine = engine_from_bundle(bundle, TARGET, CompileOptions(output=tmp_path / version), tell=said.append)
            built = onnx.load_model_from_string(last_build().plan.model)
        stored = {item.name for item in built.graph.initializer if item.data_type == onnx.TensorProto.INT8}
        weights = {name for name in stored if name.endswith(".weight")}
        assert bool(weights) == (version == "10.3.0")
        assert any("INT8 weights as float32" in text for text in said) == (version == "8.6.0")
        assert {path.name for path in engine.folder.iterdir()} == {"engine.json", "layers.json", "vision.engine"}


@pytest.mark.parametrize(("tensorrt", "tolerance"), [("8.6", 0.0), ("8.5", 1e-5)])
def test_the_lowered_graph_means_the_same(tensorrt: str, tolerance: float, bundles: Bundles, tmp_path: Path) -> None:
    bundle, pixels = bundles(Precision.FP32, INT8), pictures(2)
    wanted = outputs_of(bundle.vision, pixels, 21, [21, 5])
    path = write_lowered(bundle.vision, tensorrt, tmp_path / "lowered")
    onnx.checker.check_model(str(path), full_check=True)
    lowered = graph_from_file(path)
    assert (opset_of(lowered), lowered.ir_version) == (17, 8)
    assert lowered_for(lowered, tensorrt).SerializeToString() == lowered.SerializeToString()
    found = outputs_of(path, pixels, 21, [21, 5])
    for left, right in zip(wanted, found, strict=True):
        np.testing.assert_allclose(left.astype(np.float64), right, rtol=0, atol=tolerance)


def test_a_float_weight_rounds_to_the_same_eight_bits(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles(Precision.FP32, INT8)
    before = {item.name: item for item in onnx.load(str(bundle.vision)).graph.initializer}
    path = write_lowered(bundle.vision, "8.6", tmp_path / "lowered")
    after = {item.name: item for item in onnx.load(str(path)).graph.initializer}
    compared = 0
    for name, item in before.items():
        if item.data_type == onnx.TensorProto.INT8 and item.dims and name in after and name.endswith(".weight"):
            integers = onnx.numpy_helper.to_array(item)
            scale = onnx.numpy_helper.to_array(before[f"{name}/scale"])
            floats = onnx.numpy_helper.to_array(after[name])
            assert floats.dtype == np.float32
            np.testing.assert_array_equal(np.rint(floats / scale), integers)
            compared += 1
    assert compared > 10


def test_what_decides_is_pinned_and_the_tower_is_not(bundles: Bundles) -> None:
    model = lowered_for(graph_from_file(bundles(Precision.FP32, INT8).vision), "8.6.0")
    kept = {node.name for node in float32_nodes(model, element_types(model))}
    last = max(int(name.split("/")[2]) for name in (node.name for node in model.graph.node) if "/layers/" in name)
    decides = f"vision_tower/layers/{last}/self_attn"
    assert {f"{decides}/k_proj/MatMul", f"{decides}/k_proj/Add"} <= kept
    assert (
        sum(name.startswith(f"{decides}/q_proj/Softmax") for name in kept) == 1
    )  # of CLS; that of the kept rows is not
    assert not {name for name in kept if "/mlp/" in name or "layer_norm" in name or name.startswith("multi_modal")}
    assert not {name for name in kept if "quantized" in name or "Quantize" in name or "Dequantize" in name}
    floats = {node.name for node in model.graph.node if node.name.startswith("selection/quotas")}
    types = element_types(model)
    for node in model.graph.node:
        if node.name in floats and any(types.get(name) == onnx.TensorProto.FLOAT for name in node.output):
            assert node.name in kept, node.name


@pytest.mark.slow
@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_qwen_s_loop_stays_float32_as_a_whole(
    version: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its saliency is summed up in the body of a Loop, its weights are those of Gemm nodes, its norms are in parts."""
    plain = family_bundle("qwen2_5_vl", Precision.FP32, tmp_path_factory)
    bundle = quantized_bundle(plain, tmp_path / "bundle", INT8)
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine_from_bundle(bundle, TARGET, CompileOptions(output=tmp_path / "engines"))
        pinned = last_build().pinned
    if version == "10.3.0":
        assert not pinned
        return
    model = lowered_for(graph_from_file(bundle.vision), version)
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    body = {node.name for node in loop.attribute[0].g.node if node.op_type in ("MatMul", "Softmax", "ReduceSum", "Add")}
    roots = {node.name for node in model.graph.node if node.op_type in ("Pow", "Sqrt")}
    assert len(roots) > 10 and body | roots <= set(pinned)
    assert "visual/blocks/3/attn/qkv/Gemm" in pinned
    nodes = {node.name for node in model.graph.node if "/mlp/" in node.name or "/attn/proj/" in node.name}
    assert len(nodes) > 50 and not nodes & set(pinned)


def test_statistics_of_norms_in_parts_are_pinned_for_8_5(bundles: Bundles) -> None:
    model = lowered_for(graph_from_file(bundles(Precision.FP32, INT8).vision), "8.5")
    kept = {node.name for node in float32_nodes(model, element_types(model))}
    prefix = "vision_tower/layers/0/layer_norm1/LayerNormalization/"
    of_norm = [node for node in model.graph.node if node.name.startswith(prefix)]
    assert len(of_norm) == 9
    pinned = {node.op_type for node in of_norm if node.name in kept}
    assert pinned == {"ReduceMean", "Sub", "Mul", "Add", "Sqrt"}
    last = of_norm[-2:]  # scale and bias
    assert not {node.name for node in last} & kept


def test_a_disk_without_room_for_the_floats_is_told_before(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles(Precision.FP32, INT8)
    taken = sum(item.bytes for item in bundle.manifest.artifacts)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=taken + 1000))
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine_from_bundle(bundle, TARGET, CompileOptions(output=tmp_path / "typed"))
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()), pytest.raises(StorageError, match="needs about"):
        engine_from_bundle(bundle, TARGET, CompileOptions(output=tmp_path / "flagged"))
    assert not (tmp_path / "flagged" / "h200").exists()


def test_a_failed_build_leaves_no_floats(bundles: Bundles, tmp_path: Path) -> None:
    options = CompileOptions(output=tmp_path / "engines", profiles=("batch=1,budget=7",), workspace_mb=64)
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()) as trt:
        trt.Builder.build_serialized_network = lambda *args: None
        with pytest.raises(EngineError, match="could not build"):
            engine_from_bundle(bundles(Precision.FP32, INT8), TARGET, options)
    assert not [path for path in (tmp_path / "engines").rglob("*") if path.is_file() and "lock" not in path.name]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("precision", "kind", "target", "tensorrt", "said", "hint"),
    [
        (Precision.FP32, FP8, ORIN, "10.3", r"fp8, and NVIDIA Jetson AGX Orin 64GB \(sm_87\) has no 8-bit", "--int8"),
        (Precision.FP16, FP8, TARGET, "8.6.0", "TensorRT 8.6.0 has no 8-bit floats", "--int8"),
        (Precision.FP16, INT8, TARGET, "8.6.0", "float16 scales came with opset 19", "--int8 alone"),
        (Precision.BF16, INT8, TARGET, "8.6.0", "bfloat16 scales", "--int8 alone"),
        (Precision.FP16, INT8, target_from_name("jetson-agx-thor"), "10.13", "fp8, bf16.*is fp16-int8", "--fp16"),
        (Precision.BF16, INT8, TARGET.model_copy(update={"sm": 75}), "10.3", "sm_75 has no bfloat16", "--fp16"),
    ],
)
def test_precisions_that_cannot_be_are_refused_with_the_reason(
    precision: Precision,
    kind: QuantizedType,
    target: EngineTarget,
    tensorrt: str,
    said: str,
    hint: str,
    llava_spec: ModelSpec,
) -> None:
    plan = plan_of(llava_spec, precision, quantization_of(kind))
    with pytest.raises(EngineError, match=said) as caught:
        plan_from_target(plan, target, CompileOptions(), tensorrt)
    assert hint in caught.value.hint


@pytest.mark.parametrize("tensorrt", ["8.6.0", "10.3", "11.1"])
def test_the_cpu_s_form_is_refused_everywhere(tensorrt: str, llava_spec: ModelSpec) -> None:
    plan = plan_of(llava_spec, Precision.FP32, Quantization(type=INT8, engine="cpu"))
    with pytest.raises(EngineError, match=r"int8-cpu.*ONNX Runtime's CPU") as caught:
        plan_from_target(plan, TARGET, CompileOptions(), tensorrt)
    assert "--int8" in caught.value.hint


def test_a_quantised_decision_is_refused_before_the_build(bundles: Bundles, tmp_path: Path) -> None:
    """Somebody quantised everything, CLS query and keys too."""
    from quantized_graphs import quantized

    from holov_export.bundle import artifacts_in, atomic_folder, open_bundle, write_manifest

    bundle = bundles(Precision.FP32, INT8)
    plain = bundle.folder.parent / "plain"
    with atomic_folder(tmp_path / "all") as work:
        everything = quantized(onnx.load(str(plain / "vision.onnx")), INT8, wanted=lambda node: True)
        onnx.save_model(everything, str(work / "vision.onnx"), save_as_external_data=True, location="vision.onnx.data")
        write_manifest(work, bundle.manifest.model_copy(update={"artifacts": artifacts_in(work)}))
    with (
        tensorrt_standin.installed("10.3.0", gpu=FakeGpu()),
        pytest.raises(EngineError, match="takes part in the decision"),
    ):
        engine_from_bundle(open_bundle(tmp_path / "all"), TARGET)


def test_a_changed_weight_file_of_a_further_graph_is_found(bundles: Bundles, tmp_path: Path) -> None:
    """A graph may read a second weight file beside the one that the view names."""
    from holov_export.bundle import artifacts_in, atomic_folder, open_bundle, write_manifest

    bundle = bundles(Precision.FP32, INT8)
    with atomic_folder(tmp_path / "two") as work:
        for path in (bundle.vision, bundle.folder / bundle.weights):
            shutil.copy(path, work)
        model = onnx.load(str(work / "vision.onnx"), load_external_data=False)
        moved = next(item for item in model.graph.initializer if item.external_data)
        next(entry for entry in moved.external_data if entry.key == "location").value = "more.onnx.data"
        shutil.copy(bundle.folder / bundle.weights, work / "more.onnx.data")
        (work / "vision.onnx").write_bytes(model.SerializeToString())
        write_manifest(work, bundle.manifest.model_copy(update={"artifacts": artifacts_in(work)}))
    opened = open_bundle(tmp_path / "two")
    data = bytearray((opened.folder / "more.onnx.data").read_bytes())
    data[0] ^= 1
    (opened.folder / "more.onnx.data").write_bytes(data)
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()), pytest.raises(IntegrityError, match=r"more\.onnx\.data"):
        engine_from_bundle(opened, TARGET)


# ----------------------------------------------------------------------------------------------- readiness, dry runs


CLAIMED = [
    pytest.param(target, precision, kind, id=f"{target.name}-{precision.value}-{kind.value if kind else 'float'}")
    for target in list_targets()
    for precision in Precision
    for kind in (None, INT8, FP8)
    if target.supports(precision.value)
    and (kind is None or target.supports(kind.value))
    and (kind is None or precision is Precision.FP32 or target.tensorrt.highest >= (9,))  # float16 scales: opset 19
]


@pytest.mark.parametrize(("target", "precision", "kind"), CLAIMED)
def test_every_precision_is_ready_on_every_target_that_claims_it(
    target: EngineTarget,
    precision: Precision,
    kind: QuantizedType | None,
    exported_graph: ExportedGraph,
    bundles: Bundles,
    llava_spec: ModelSpec,
) -> None:
    """For the lowest TensorRT of each kind in the target's range that a plan can be made for, and there is one."""
    from holov_export.compile.compilation import branches_of

    if kind is None:
        plan, path = plan_of_floats(llava_spec, precision), exported_graph("holov", precision) / "vision.onnx"
    else:
        plan, path = plan_of(llava_spec, precision, quantization_of(kind)), bundles(precision, kind).vision
    checked = []
    for version in dict.fromkeys((*branches_of(target), target.tensorrt.max)):
        try:
            plan_from_target(plan, target, CompileOptions(), version)
        except EngineError:
            continue
        report = readiness_of(path, [version]).of(version)
        assert not [item for item in report.findings if item.severity == "error"], version
        checked.append(version)
    assert checked


def plan_of_floats(model: ModelSpec, precision: Precision) -> ExportPlan:
    return plan_of(model, precision, quantization_of(INT8)).model_copy(
        update={"quantization": None, "opset": opset_of_plan(precision)}
    )


def test_dry_runs_say_flags_pins_and_the_lowering(bundles: Bundles) -> None:
    bundle = bundles(Precision.FP32, INT8)
    eight, ten, eleven = previews(bundle.manifest.plan, bundle.folder, TARGET, CompileOptions())
    lower, trtexec = eight.commands
    assert lower[:2] == ("holov-export", "lower")
    assert {"--int8", "--fp16", "--precisionConstraints=obey"} <= set(trtexec)
    pins = next(item for item in trtexec if item.startswith("--layerPrecisions="))
    assert "k_proj/MatMul:fp32" in pins and "fc1" not in pins and "Quantize" not in pins
    assert eight.plan is not None and (eight.plan.network, eight.plan.precision_name) == ("int8-flag", "int8")
    for typed, options in ((ten, {"--stronglyTyped"}), (eleven, set())):
        said = set(typed.commands[0])
        assert options <= said and not {"--int8", "--fp16", "--fp8"} & said


def test_every_option_of_the_dry_run_is_in_the_list_of_trtexec(bundles: Bundles) -> None:
    rows = [line.split("\t") for line in (Path(__file__).parent / "trtexec_options.tsv").read_text().splitlines()]
    known = {row[0] for row in rows}
    for made in previews(bundles(Precision.FP32, INT8).manifest.plan, Path("b"), TARGET, CompileOptions()):
        for command in made.commands[-1:]:
            assert {item.split("=")[0] for item in command[1:]} <= known


# ------------------------------------------------------------------------------------- what the package itself writes


def ranges_of(model: onnx.ModelProto) -> Ranges:
    """As if every activation lay between -3 and 3."""
    names = {name for linear in linears_of(model) for name in linear.activations}
    record = RangesRecord(
        recipe="by-hand",
        recipe_sha256="0" * 64,
        graph_sha256="1" * 64,
        weights_sha256="2" * 64,
        algorithm="minmax",
        pictures=(("a.png", "3" * 64),),
        budgets=(4,),
        tensors={name: TensorRange(low=-3, high=3) for name in names},
        created="2026-01-01T00:00:00Z",
        seconds=1.0,
    )
    return Ranges(record, {})


@pytest.mark.parametrize(
    ("precision", "kind", "versions"),
    [
        (Precision.FP32, INT8, ("8.5", "8.6", "10.3", "10.13", "11.1")),
        (Precision.FP16, INT8, ("10.3", "10.13", "11.1")),
        (Precision.FP16, FP8, ("10.3", "10.13", "11.1")),
    ],
)
def test_what_the_quantiser_writes_is_ready(
    precision: Precision,
    kind: QuantizedType,
    versions: tuple[str, ...],
    exported_graph: ExportedGraph,
    tmp_path: Path,
) -> None:
    source = exported_graph("holov", precision) / "vision.onnx"
    written = tmp_path / "vision.onnx"
    summary = write_quantized(source, written, quantization_of(kind), ranges_of(graph_from_file(source)))
    assert summary.quantized
    report = readiness_of(written)
    assert tuple(item.tensorrt for item in report.versions if item.ready) == versions
    for item in report.versions:
        assert not [finding for finding in item.findings if finding.severity == "warning"], item.tensorrt
    if "8.6" in versions:
        pixels = pictures(2)
        lowered = write_lowered(written, "8.6", tmp_path / "lowered")
        for left, right in zip(
            outputs_of(written, pixels, 9, [9, 5]), outputs_of(lowered, pixels, 9, [9, 5]), strict=True
        ):
            np.testing.assert_array_equal(left, right)


def test_the_cpu_s_form_is_one_finding_with_a_way_out(exported_graph: ExportedGraph, tmp_path: Path) -> None:
    source = exported_graph("holov", Precision.FP32) / "vision.onnx"
    write_quantized_cpu(source, tmp_path / "vision.onnx", Quantization(type=INT8, engine="cpu"))
    for version in readiness_of(tmp_path / "vision.onnx").versions:
        errors = [item for item in version.findings if item.severity == "error"]
        assert {item.rule for item in errors} == {"quantized-for-cpu"} and len(errors) == 1, version.tensorrt
        assert "--int8" in errors[0].way_out


def test_float_weights_are_counted(bundles: Bundles) -> None:
    model = graph_from_file(bundles(Precision.FP32, INT8).vision)
    stored = [
        item for item in model.graph.initializer if item.data_type == onnx.TensorProto.INT8 and len(item.dims) == 2
    ]
    outside = [item for item in stored if item.external_data]
    assert float_bytes(model, lowered_for(model, "8.6")) == sum(4 * item.dims[0] * item.dims[1] for item in outside) > 0
    assert float_bytes(model, lowered_for(model, "10.3")) == 0
