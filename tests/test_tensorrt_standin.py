"""The stand-ins of TensorRT: names and signatures of each version, and numbers against ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_standin
from onnx import helper
from tensorrt_standin import VERSIONS
from tensorrt_standin.api import api, table
from tensorrt_standin.trial import H200, NEW, OLD, Parsed, expected, inputs, running, small_model

every_version = pytest.mark.parametrize("version", VERSIONS)


# ---------------------------------------------------------------------------------------------------- names


def test_the_tables_agree_with_each_other() -> None:
    rows = table("api.tsv")
    names = [row["name"] for row in rows]
    assert names == sorted(names) and len(names) == len(set(names))
    for version in VERSIONS:
        here = {row["name"] for row in rows if row[version] == "y"}
        members = {f"{enum}.{member}" for enum, found in api(version).enums.items() for member in found}
        assert members <= here
        assert all(name.rpartition(".")[0] in here for name in here if "." in name)


@every_version
def test_a_version_has_its_names_and_no_other(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        assert trt.__version__ == version
        for row in table("api.tsv"):
            owner, _, member = row["name"].rpartition(".")
            place = getattr(trt, owner, None) if owner else trt
            if row[version] == "y":
                assert hasattr(place, member), row["name"]
            elif place is not None and member not in dir(object):
                assert not hasattr(place, member), row["name"]


@every_version
def test_enum_members_are_numbers_of_that_version(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        tf32 = trt.BuilderFlag.TF32
        assert int(tf32) == (7 if version == OLD else 6) and tf32.name == "TF32" and tf32.value == int(tf32)
        assert repr(tf32) == f"<BuilderFlag.TF32: {int(tf32)}>" and str(tf32) == "BuilderFlag.TF32"
        assert trt.BuilderFlag(int(tf32)) == tf32 and tf32 in {tf32: 1} and tf32 != int(tf32)
        assert trt.BuilderFlag.__members__["TF32"] is tf32
        with pytest.raises(TypeError, match="unsupported operand"):
            _ = 1 << tf32
        with pytest.raises(AttributeError, match=r"type object 'tensorrt.tensorrt.BuilderFlag' has no attribute 'NO'"):
            _ = trt.BuilderFlag.NO
        assert trt.float16 == trt.DataType.HALF and trt.float16.itemsize == 2


def test_the_parsers_error_codes_print_as_their_version_does() -> None:
    for version, printed in ((OLD, "ErrorCode.INVALID_NODE"), (NEW, "INVALID_NODE")):
        with tensorrt_standin.installed(version, gpu=H200) as trt:
            assert str(trt.ErrorCode.INVALID_NODE) == printed
            assert callable(trt.ErrorCode.INVALID_NODE.name) is (version == OLD)  # a slip of 8.6.0's bindings


def test_a_logger_that_fails_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with tensorrt_standin.installed(OLD, gpu=H200) as trt:

        class Loud(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                raise OSError("no room")

        config = trt.Builder(Loud()).create_builder_config()
        config.builder_optimization_level = 9
        assert "Exception caught in log(): no room" in capsys.readouterr().err

        class Unmade(trt.ILogger):
            def __init__(self) -> None:
                pass

        with pytest.raises(TypeError, match=r"ILogger.__init__\(\) must be called"):
            trt.Builder(Unmade())


def test_missing_names_fail_with_the_words_of_the_real_thing() -> None:
    with tensorrt_standin.installed(OLD, gpu=H200) as trt:
        config = trt.Builder(trt.Logger()).create_builder_config()
        with pytest.raises(AttributeError, match="module 'tensorrt' has no attribute 'OnnxParserRefitter'"):
            _ = trt.OnnxParserRefitter
        with pytest.raises(AttributeError, match=r"'tensorrt.tensorrt.IBuilderConfig' object has no attribute"):
            _ = config.progress_monitor
        with pytest.raises(AttributeError, match=r"'tensorrt.tensorrt.IBuilderConfig' object has no attribute"):
            config.progress_monitor = None
        with pytest.raises(AttributeError, match=r"'tensorrt.tensorrt.IBuilderConfig' object has no attribute"):
            config.my_own = 1
        with pytest.raises(TypeError, match=r"tensorrt.tensorrt.IBuilderConfig: No constructor defined!"):
            trt.IBuilderConfig()


@every_version
def test_calls_that_fit_no_signature_are_refused(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        builder = trt.Builder(trt.Logger())
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        wrong = [
            lambda: trt.Logger("loud"),
            lambda: trt.Builder(None),
            lambda: config.set_flag(trt.MemoryPoolType.WORKSPACE),
            lambda: config.set_flag(int(trt.BuilderFlag.TF32)),
            lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5),
            lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
            lambda: config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, bytes=1),
            lambda: config.create_timing_cache("text"),
            lambda: profile.set_shape("x", 1, 2, 3),
            lambda: builder.build_serialized_network(config, config),
            lambda: trt.OnnxParser(None, trt.Logger()),
        ]
        for call in wrong:
            with pytest.raises(TypeError, match=r"incompatible (function|constructor) arguments"):
                call()
        config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1 << 20)
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20


def test_what_is_known_but_not_acted_says_so() -> None:
    with tensorrt_standin.installed(NEW, gpu=H200) as trt:
        config = trt.Builder(trt.Logger()).create_builder_config()
        with pytest.raises(NotImplementedError, match=r"11\.4\.0 knows IBuilderConfig.set_device_type"):
            config.set_device_type(Parsed(trt).network.get_layer(0), trt.DeviceType.GPU)


@every_version
def test_without_a_driver_nothing_may_be_made(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=None) as trt:
        import holov_export.gpu as gpu

        assert isinstance(gpu.probe(), gpu.NoGpu)
        for make in (trt.Builder, trt.Runtime):
            with pytest.raises(AssertionError, match="without a GPU"):
                make(trt.Logger())
        from cuda.bindings import runtime

        assert runtime.cudaMalloc(16) == (runtime.cudaError_t.cudaErrorInsufficientDriver, None)


def test_the_stand_ins_leave_no_trace() -> None:

    import holov_export.gpu as gpu

    before, probe = (
        {key: value for key, value in sys.modules.items() if key.startswith(("cuda", "tensorrt"))},
        gpu.probe,
    )
    with tensorrt_standin.installed(NEW, gpu=H200) as trt:
        import tensorrt

        assert tensorrt is trt and gpu.probe() == gpu.Gpu("NVIDIA H200", 90, H200.memory, False, "12.6")
    assert {key: value for key, value in sys.modules.items() if key.startswith(("cuda", "tensorrt"))} == before
    assert gpu.probe is probe


# ---------------------------------------------------------------------------------------------------- numbers


@every_version
def test_an_engine_gives_the_numbers_of_its_graph_at_every_shape(version: str) -> None:
    with running(version) as (run, world):
        for batch, budget in ((1, 1), (3, 5), (4, 8)):
            x, quota = inputs(batch)
            run.shape(batch, budget)
            run.put(x, quota)
            assert run.enqueue()
            found = run.get()
            run.call("cudaStreamSynchronize", run.stream)
            y, counts = expected(x, quota, budget)
            assert found["y"].shape == (batch, budget, 16)
            np.testing.assert_array_equal(found["y"], y)
            np.testing.assert_array_equal(found["counts"], counts)
        run.close()
        assert world.leaked() == []


@every_version
def test_a_graph_replays_with_new_inputs(version: str) -> None:
    with running(version) as (run, world):
        run.shape(2, 3)
        run.put(*inputs(2))
        assert run.enqueue()
        executable = run.capture()
        x, quota = inputs(7)[0][:2], np.array([1, 8])
        run.put(x, quota)
        run.call("cudaGraphLaunch", executable, run.stream)
        found = run.get()
        np.testing.assert_array_equal(found["y"], expected(x, quota, 3)[0])
        run.call("cudaGraphExecDestroy", executable)
        run.close()
        assert world.leaked() == [] and world.cuda.streams.launches == 1


@every_version
def test_integers_and_shape_tensors_are_those_of_the_version(version: str) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        parsed = Parsed(trt)
        found = {item.name: item for item in (parsed.network.get_input(place) for place in range(3))}
        integer = trt.int32 if version == OLD else trt.int64
        assert found["quota"].dtype == found["budget"].dtype == integer and found["x"].dtype == trt.float32
        assert [found[name].is_shape_tensor for name in ("x", "budget", "quota")] == [False, True, False]
        assert found["x"].shape == (-1, 8, 3)
        engine = parsed.engine()
        assert engine.get_tensor_location("budget") == trt.TensorLocation.HOST
        assert engine.get_tensor_location("quota") == trt.TensorLocation.DEVICE
        assert engine.get_tensor_mode("y") == trt.TensorIOMode.OUTPUT and engine.num_io_tensors == 5
        assert engine.get_tensor_profile_shape("x", 0) == [(1, 8, 3), (2, 8, 3), (4, 8, 3)]
        if version != OLD:  # the real bindings swap the two names
            assert engine.get_tensor_profile_values(0, "budget") == [[1], [4], [8]]
            with pytest.raises(TypeError, match="incompatible function arguments"):
                engine.get_tensor_profile_values("budget", 0)


# ---------------------------------------------------------------------------------------------------- the parser


def test_weights_outside_of_the_graph_are_found_beside_the_path(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small_model(), str(path), save_as_external_data=True, location="model.data", size_threshold=0)
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:
        parsed = Parsed(trt)
        for network, parse in (
            (parsed.builder.create_network(0), lambda parser: parser.parse(path.read_bytes(), str(path))),
            (parsed.builder.create_network(0), lambda parser: parser.parse_from_file(str(path))),
        ):
            parser = trt.OnnxParser(network, parsed.logger)
            assert parse(parser) and network.num_outputs == 2
        lost = trt.OnnxParser(parsed.builder.create_network(0), parsed.logger)
        assert not lost.parse(path.read_bytes()) and lost.num_errors == 1


@pytest.mark.parametrize(("version", "opset", "fits"), [(OLD, 17, True), (OLD, 18, False), ("10.3.0", 20, True),
                                                        ("10.3.0", 21, False), (NEW, 23, True)])  # fmt: skip
def test_the_opset_ceiling(version: str, opset: int, fits: bool) -> None:
    with tensorrt_standin.installed(version, gpu=H200) as trt:
        assert Parsed(trt, small_model(opset)).ok is fits


def test_an_operator_that_a_version_lacks_is_named() -> None:
    gelu = helper.make_node("Gelu", ["y"], ["z"], name="activate")
    model = small_model(20, gelu)
    with tensorrt_standin.installed(OLD, gpu=H200) as trt:
        parsed = Parsed(trt, model)
        assert not parsed.ok
        errors = [parsed.parser.get_error(place) for place in range(parsed.parser.num_errors)]
        assert [item.code() for item in errors] == [trt.ErrorCode.UNSUPPORTED_GRAPH, trt.ErrorCode.UNSUPPORTED_NODE]
        assert "Gelu" in errors[1].desc() and errors[1].node() == 5
        assert not hasattr(errors[1], "node_name")
        assert not parsed.parser.supports_operator("Gelu") and parsed.parser.supports_operator("LayerNormalization")
    with tensorrt_standin.installed("10.3.0", gpu=H200) as trt:
        assert Parsed(trt, model).ok


def test_eight_wants_explicit_batches() -> None:
    with tensorrt_standin.installed(OLD, gpu=H200) as trt:
        assert not Parsed(trt, flags=0).ok


def test_garbage_is_no_model() -> None:
    with tensorrt_standin.installed(NEW, gpu=H200) as trt:
        parser = trt.OnnxParser(trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_network(), trt.Logger())
        assert not parser.parse(b"garbage") and parser.get_error(0).code() == trt.ErrorCode.MODEL_DESERIALIZE_FAILED
