"""The whole way from a bundle to an engine, against the stand-ins of five TensorRT versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_standin
from engine_bundles import bundle_around
from tensorrt_standin import VERSIONS, FakeGpu

from holov_export.bundle import Bundle, verify_artifacts
from holov_export.compile import engine_from_onnx
from holov_export.compile.compilation import CompileOptions
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.compile.timing_cache import cache_path
from holov_export.engine import LAYERS, check_engine, engines_in
from holov_export.errors import EngineError, HardwareError, IntegrityError
from holov_export.gpu import require_gpu
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.spec import ModelSpec, Precision
from holov_export.targets import BuildFlags, EngineTarget, target_from_name
from holov_export.tensors import PixelBatch

ExportedGraph = Callable[[str, Precision], Path]
Bundles = Callable[[Precision], Bundle]
TARGET = target_from_name("h200")
FLAGGED = {"8.6.0"}
TYPED = set(VERSIONS) - FLAGGED


@pytest.fixture
def bundles(exported_graph: ExportedGraph, llava_spec: ModelSpec, tmp_path: Path) -> Bundles:
    """precision -> a bundle of this test's own."""

    def make(precision: Precision) -> Bundle:
        graph = exported_graph("holov", precision)
        return bundle_around(graph, tmp_path / precision.value, llava_spec, precision)

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def last_build() -> tensorrt_standin.Build:
    return tensorrt_standin.current().builds[-1]


def pictures(bundle: Bundle, count: int) -> PixelBatch:
    side = bundle.manifest.plan.model.vision.image_size
    values = np.random.default_rng(3).standard_normal((count, 3, side, side)).astype(np.float32)
    return PixelBatch(values, (), ())


# -------------------------------------------------------------------------------------------- every version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_an_engine_computes_what_onnx_runtime_computes(version: str, precision: Precision, bundles: Bundles) -> None:
    bundle = bundles(precision)
    pixels = pictures(bundle, 3)
    with OrtRunner(bundle) as ort:
        expected = ort.run(pixels, 9, [9, 5, 1])
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine = engine_from_bundle(bundle, TARGET)
        with TrtRunner(bundle) as runner:
            found = runner.run(pixels, 9, [9, 5, 1])
    assert engine.folder == bundle.folder / "engines" / "h200"
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_allclose(found.tokens, expected.tokens, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_precision_is_given_as_the_version_wants_it(version: str, precision: Precision, bundles: Bundles) -> None:
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine = engine_from_bundle(bundles(precision), TARGET)
        build = last_build()
    assert build.strongly_typed == (version in TYPED)
    assert "TF32" not in build.flags
    flagged = version in FLAGGED and precision is Precision.FP16
    assert ({"FP16", "OBEY_PRECISION_CONSTRAINTS"} <= build.flags) == flagged
    assert bool(build.pinned) == flagged
    kind = "strongly-typed" if version in TYPED else "fp16-flag" if flagged else "fp32"
    assert engine.record.built_with.network == kind
    assert engine.record.opset == (17 if version in FLAGGED else 18)


def test_pins_may_be_wishes(bundles: Bundles) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        engine = engine_from_bundle(bundles(Precision.FP16), TARGET, CompileOptions(prefer=True))
        build = last_build()
    assert engine.record.built_with.network == "fp16-flag, pins preferred"
    assert "PREFER_PRECISION_CONSTRAINTS" in build.flags and "OBEY_PRECISION_CONSTRAINTS" not in build.flags
    assert build.pinned


@pytest.mark.parametrize("version", VERSIONS)
def test_profiles_reach_tensorrt(version: str, bundles: Bundles) -> None:
    options = CompileOptions(profiles=("batch=1,budget=1:7:64", "batch=1:2:4,budget=7"))
    bundle = bundles(Precision.FP32)
    side = bundle.manifest.plan.model.vision.image_size
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine = engine_from_bundle(bundle, TARGET, options)
        plan = last_build().plan
    first, second = plan.profiles
    assert (second["pixel_values"].low, second["pixel_values"].high) == ((1, 3, side, side), (4, 3, side, side))
    assert (first["quota"].low, second["quota"].opt) == ((1,), (2,))
    values = [(item["budget"].low, item["budget"].opt, item["budget"].high) for item in plan.values]
    assert values == [((1,), (7,), (64,)), ((7,), (7,), (7,))]
    assert [item.budget for item in engine.record.profiles] == [(1, 7, 64), (7, 7, 7)]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_is_recorded_and_passes_its_check(version: str, bundles: Bundles) -> None:
    bundle = bundles(Precision.FP16)
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        made = engine_from_bundle(bundle, TARGET)
        gpu = require_gpu()
    (found,) = engines_in(bundle.folder / "engines")
    assert found.record == made.record
    hashes = {item.path: item.sha256 for item in bundle.manifest.artifacts}
    check_engine(
        found, gpu, version, graph_sha256=hashes["vision.onnx"], weights_sha256=hashes["vision.onnx.data"], full=True
    )
    built = found.record.built_with
    assert (built.tensorrt, built.gpu, built.sm, built.cuda) == (version, "NVIDIA H200", 90, "12.6")
    assert found.record.created.endswith("+00:00")
    layers = json.loads((found.folder / LAYERS).read_text(encoding="utf-8"))["Layers"]
    assert {"Name", "LayerType"} <= set(layers[0])  # DETAILED; names alone would be strings
    verify_artifacts(bundle)  # the bundle itself is as it was exported


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_left_on_the_device(version: str, bundles: Bundles) -> None:
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine_from_bundle(bundles(Precision.FP32), TARGET)
        assert not tensorrt_standin.current().leaked()


def test_a_bfloat16_engine_has_a_typed_network(bundles: Bundles) -> None:
    heard: list[str] = []
    with tensorrt_standin.installed("10.16.1", gpu=FakeGpu()):
        engine = engine_from_bundle(bundles(Precision.BF16), TARGET, tell=heard.append)
    assert engine.record.opset == 22
    # the stand-in runs engines on a CPU, which has no bfloat16: the report is lost, the engine is not
    assert not (engine.folder / LAYERS).exists()
    assert any("no layer report" in text for text in heard)


# -------------------------------------------------------------------------------------------- settings


def test_workspace_level_and_portability(bundles: Bundles) -> None:
    options = CompileOptions(
        workspace_mb=100,
        optimization_level=5,
        tf32=True,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        weight_streaming=True,
        refit=True,
    )
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine = engine_from_bundle(bundles(Precision.FP16), TARGET, options)
        build = last_build()
    assert build.pools["WORKSPACE"] == 100 * 2**20
    assert build.level == 5
    assert {"TF32", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "REFIT"} <= build.flags
    assert build.plan.hardware_compatibility == "AMPERE_PLUS"
    built = engine.record.built_with
    assert (built.version_compatible, built.hardware_compatibility) == (True, "ampere_plus")
    assert (built.weight_streaming, built.refittable, built.stripped) == (True, True, False)
    assert (engine.folder / LAYERS).exists()  # a version-compatible plan needs the runtime's permission to load


def test_a_stripped_engine_has_no_weights(bundles: Bundles) -> None:
    bundle = bundles(Precision.FP16)
    with tensorrt_standin.installed("10.13.3", gpu=FakeGpu()):
        whole = engine_from_bundle(bundle, TARGET)
        stripped = engine_from_bundle(bundle, TARGET, CompileOptions(strip_plan=True))
        assert "STRIP_PLAN" in last_build().flags
    assert stripped.record.built_with.stripped
    assert stripped.record.bytes < whole.record.bytes / 2


def test_the_target_says_what_the_user_does_not(bundles: Bundles) -> None:
    target = TARGET.model_copy(update={"flags": BuildFlags(refit=True, version_compatible=True)})
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine_from_bundle(bundles(Precision.FP32), target, CompileOptions(refit=False))
        flags = last_build().flags
    assert "VERSION_COMPATIBLE" in flags
    assert "REFIT" not in flags


def test_threads_may_share_a_profile_on_8_6(bundles: Bundles) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        engine_from_bundle(bundles(Precision.FP32), TARGET)
        assert "PROFILE_SHARING_0806" in last_build().preview


def test_without_a_report_the_engine_is_not_loaded_again(bundles: Bundles) -> None:
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine = engine_from_bundle(bundles(Precision.FP32), TARGET, CompileOptions(layer_report=False))
        assert last_build().plan.verbosity == "LAYER_NAMES_ONLY"
    assert not (engine.folder / LAYERS).exists()


def test_an_engine_can_lie_outside_of_its_bundle(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles(Precision.FP32)
    before = sorted(bundle.folder.iterdir())
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine = engine_from_bundle(bundle, TARGET, CompileOptions(output=tmp_path / "elsewhere"))
        with TrtRunner(bundle, engine=engine.folder) as runner:
            assert runner.run(pictures(bundle, 1), 3).counts.tolist() == [3]
    assert engine.folder == tmp_path / "elsewhere" / "h200"
    assert sorted(bundle.folder.iterdir()) == before


# -------------------------------------------------------------------------------------------- pins


def test_the_selection_is_pinned_and_the_tower_is_not(bundles: Bundles) -> None:
    heard: list[str] = []
    bundle = bundles(Precision.FP16)
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        engine_from_bundle(bundle, TARGET, tell=heard.append)
        pinned = last_build().pinned
    assert {precision for precision, _ in pinned.values()} == {"FLOAT"}
    graph = onnx.load(str(bundle.vision), load_external_data=False).graph
    operators = {node.name: node.op_type for node in graph.node}
    operators |= {tensor.name: "Constant" for tensor in graph.initializer}
    assert [operators[name] for name in pinned].count("Softmax") == 1  # that of the CLS row
    assert [operators[name] for name in pinned].count("TopK") == 2
    assert not any(word in name for name in pinned for word in ("mlp", "layer_norm", "projector", "embeddings"))
    for name, (_, outputs) in pinned.items():
        compares = operators[name] in ("Greater", "GreaterOrEqual", "Equal")
        to_integer = operators[name] == "Cast" and outputs == ()
        assert outputs == (() if compares or to_integer else ("FLOAT",))
    assert any(f"kept in float32: {len(pinned)} of" in text for text in heard)


def test_a_network_of_which_nothing_can_be_traced_is_refused(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_standin import network

    monkeypatch.setattr(network.ILayer, "type", property(lambda layer: layer.world.enum("LayerType", "CONSTANT")))
    with (
        tensorrt_standin.installed("8.6.0", gpu=FakeGpu()),
        pytest.raises(EngineError, match="half precision"),
    ):
        engine_from_bundle(bundles(Precision.FP16), TARGET)


# -------------------------------------------------------------------------------------------- what is refused


def test_without_a_gpu_tensorrt_is_not_touched(bundles: Bundles) -> None:
    with (
        tensorrt_standin.installed("10.3.0", gpu=None),
        pytest.raises(HardwareError, match="no usable NVIDIA GPU") as caught,
    ):
        engine_from_bundle(bundles(Precision.FP32), TARGET)
    assert caught.value.exit_code == 3


def test_another_gpu_is_refused_and_its_targets_are_named(bundles: Bundles) -> None:
    with (
        tensorrt_standin.installed("10.3.0", gpu=FakeGpu(name="NVIDIA L4", sm=89, memory=24 << 30)),
        pytest.raises(EngineError, match=r"h200.*sm_90.*NVIDIA L4.*sm_89") as caught,
    ):
        engine_from_bundle(bundles(Precision.FP32), TARGET)
    assert "l40s" in caught.value.hint


def test_another_tensorrt_is_refused(bundles: Bundles) -> None:
    target = target_from_name("jetson-agx-orin-64gb")
    with (
        tensorrt_standin.installed("8.6.0", gpu=FakeGpu(name="Orin", sm=87, integrated=True)),
        pytest.raises(EngineError, match=r"TensorRT 10\.3, not 8\.6\.0"),
    ):
        engine_from_bundle(bundles(Precision.FP32), target)


@pytest.mark.parametrize(
    ("version", "options", "said"),
    [
        ("8.6.0", CompileOptions(weight_streaming=True), "weight streaming"),
        ("8.6.0", CompileOptions(strip_plan=True), "stripped plans"),
        ("10.3.0", CompileOptions(hardware_compatibility="same_compute_capability"), "same compute capability"),
    ],
)
def test_what_a_version_lacks_is_refused(version: str, options: CompileOptions, said: str, bundles: Bundles) -> None:
    with tensorrt_standin.installed(version, gpu=FakeGpu()), pytest.raises(EngineError, match=said):
        engine_from_bundle(bundles(Precision.FP32), TARGET, options)


def test_a_changed_graph_is_refused_before_tensorrt_sees_it(bundles: Bundles) -> None:
    bundle = bundles(Precision.FP32)
    weights = bundle.folder / "vision.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        with pytest.raises(IntegrityError, match=r"vision\.onnx\.data"):
            engine_from_bundle(bundle, TARGET)
        assert not tensorrt_standin.current().builds
    assert not (bundle.folder / "engines").exists()


def test_a_graph_that_is_not_ready_is_refused_unless_forced(
    exported_graph: ExportedGraph, llava_spec: ModelSpec, tmp_path: Path
) -> None:
    bundle = _bundle_with(_nonzero_graph, exported_graph, llava_spec, tmp_path)
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        with pytest.raises(EngineError, match="would not take the graph") as caught:
            engine_from_bundle(bundle, TARGET)
        assert "check" in caught.value.hint
        with pytest.raises(EngineError, match=r"does not parse the graph: .*Unique") as caught:
            engine_from_bundle(bundle, TARGET, CompileOptions(force=True))
    assert "bad/Unique (Unique)" in caught.value.message
    assert not engines_in(bundle.folder / "engines")


def _nonzero_graph(model: onnx.ModelProto) -> None:
    """Add an operator that no TensorRT has."""
    node = onnx.helper.make_node("Unique", ["quota"], ["unique"], name="bad/Unique")
    model.graph.node.append(node)


def _bundle_with(
    change: Callable[[onnx.ModelProto], None], exported_graph: ExportedGraph, spec: ModelSpec, folder: Path
) -> Bundle:
    """A bundle whose graph was changed before it was hashed."""
    graph = folder / "graph"
    graph.mkdir()
    source = exported_graph("holov", Precision.FP32)
    (graph / "vision.onnx.data").write_bytes((source / "vision.onnx.data").read_bytes())
    model = onnx.load(str(source / "vision.onnx"), load_external_data=False)
    change(model)
    (graph / "vision.onnx").write_bytes(model.SerializeToString())
    return bundle_around(graph, folder / "changed", spec, Precision.FP32)


def test_a_failed_build_says_what_tensorrt_said(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_standin import builder

    def fail(*arguments: object) -> None:
        raise builder.BuildError("Error Code 2: OutOfMemory (requested size 42)")

    monkeypatch.setattr(builder, "_build", fail)
    bundle = bundles(Precision.FP32)
    with (
        tensorrt_standin.installed("10.3.0", gpu=FakeGpu()),
        pytest.raises(EngineError, match=r"OutOfMemory \(requested size 42\)") as caught,
    ):
        engine_from_bundle(bundle, TARGET)
    assert "--workspace" in caught.value.hint
    assert not (bundle.folder / "engines").exists()


def test_what_tensorrt_said_of_a_foreign_cache_is_not_why_a_build_failed(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_standin import builder

    (tmp_path / "timings").write_bytes(b"rubbish")
    monkeypatch.setattr(builder, "_build", lambda *arguments: (_ for _ in ()).throw(builder.BuildError("no tactic")))
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()), pytest.raises(EngineError, match="no tactic") as caught:
        engine_from_bundle(bundles(Precision.FP32), TARGET, CompileOptions(timing_cache=tmp_path / "timings"))
    assert "timing cache" not in caught.value.message


def test_a_builder_that_cannot_be_made_is_a_hardware_error(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()) as trt:

        def refuse(logger: object) -> None:
            logger.log(trt.ILogger.Severity.WARNING, "CUDA initialization failure with error: 35")  # type: ignore[attr-defined]
            raise TypeError("pybind11::init(): factory function returned nullptr")

        monkeypatch.setattr(trt, "Builder", refuse)
        with pytest.raises(HardwareError, match="error: 35"):
            engine_from_bundle(bundles(Precision.FP32), TARGET)


# -------------------------------------------------------------------------------------------- timing cache


def test_a_second_build_measures_nothing_again(bundles: Bundles) -> None:
    bundle = bundles(Precision.FP16)
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine_from_bundle(bundle, TARGET)
        first = last_build()
        engine_from_bundle(bundle, TARGET)
        second = last_build()
    assert first.new_timings > 0
    assert second.new_timings == 0
    assert cache_path("h200", "10.3.0", 90).is_file()


@pytest.mark.parametrize("content", [b"rubbish", b""])
def test_a_broken_cache_is_mentioned_and_replaced(content: bytes, bundles: Bundles, tmp_path: Path) -> None:
    heard: list[str] = []
    path = tmp_path / "timings"
    path.write_bytes(content)
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        engine_from_bundle(bundles(Precision.FP32), TARGET, CompileOptions(timing_cache=path), tell=heard.append)
        assert last_build().timing_cache
    assert any("damaged" in text for text in heard) == bool(content)
    assert b"entries" in path.read_bytes()


def test_the_cache_of_another_tensorrt_is_not_used(bundles: Bundles, tmp_path: Path) -> None:
    path, bundle = tmp_path / "timings", bundles(Precision.FP32)
    heard: list[str] = []
    with tensorrt_standin.installed("8.6.0", gpu=FakeGpu()):
        engine_from_bundle(bundle, TARGET, CompileOptions(timing_cache=path))
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine_from_bundle(bundle, TARGET, CompileOptions(timing_cache=path), tell=heard.append)
        assert last_build().new_timings > 0
    assert any("another TensorRT" in text for text in heard)


def test_a_cache_that_cannot_be_written_does_not_lose_the_engine(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    heard: list[str] = []
    options = CompileOptions(timing_cache=tmp_path / "file" / "timings")
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine = engine_from_bundle(bundles(Precision.FP32), TARGET, options, tell=heard.append)
    assert engine.plan.is_file()
    assert any("cannot be" in text for text in heard)


def test_no_cache_is_kept_when_nobody_wants_one(bundles: Bundles) -> None:
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine_from_bundle(bundles(Precision.FP32), TARGET, CompileOptions(use_timing_cache=False))
        assert not last_build().timing_cache
    assert not cache_path("h200", "10.3.0", 90).exists()


# -------------------------------------------------------------------------------------------- progress and warnings


@pytest.mark.parametrize("version", VERSIONS)
def test_steps_are_told(version: str, bundles: Bundles) -> None:
    heard: list[str] = []
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine_from_bundle(bundles(Precision.FP32), TARGET, tell=heard.append)
    assert f"build the engine: h200, TensorRT {version}, NVIDIA H200" in heard


def test_warnings_are_told_once(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_standin import builder

    build = builder._build

    def warn(world: tensorrt_standin.World, network: object, config: object) -> object:
        for _ in range(3):
            world.log(network.builder.logger, "WARNING", "Weights were clamped")  # type: ignore[attr-defined]
        return build(world, network, config)  # type: ignore[arg-type]

    monkeypatch.setattr(builder, "_build", warn)
    heard: list[str] = []
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        engine_from_bundle(bundles(Precision.FP32), TARGET, tell=heard.append)
    assert [text for text in heard if "clamped" in text] == ["TensorRT warns: Weights were clamped"]


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_an_interrupted_build_leaves_the_old_engine(
    version: str, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles(Precision.FP32)

    def interrupt(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        old = engine_from_bundle(bundle, TARGET)
        monkeypatch.setattr(engine_from_onnx, "watched", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine_from_bundle(bundle, TARGET, CompileOptions(optimization_level=1))
    (found,) = engines_in(bundle.folder / "engines")
    assert found.record == old.record
    assert [path.name for path in found.folder.parent.iterdir()] == ["h200"]


def test_a_jetson_gives_the_builder_no_more_memory_than_there_is(bundles: Bundles) -> None:
    nano: EngineTarget = target_from_name("jetson-orin-nano-8gb")
    board = FakeGpu(name="Orin", sm=87, memory=1 << 28, integrated=True)
    with tensorrt_standin.installed("10.3.0", gpu=board):
        engine_from_bundle(bundles(Precision.FP16), nano)
        assert last_build().pools["WORKSPACE"] <= 1 << 28
