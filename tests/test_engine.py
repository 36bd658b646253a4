"""Which engines are refused before TensorRT sees them, from their record alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holov_export.engine import (
    RECORD,
    SCHEMA,
    AxisSize,
    AxisSizes,
    AxisSpan,
    BuiltWith,
    EngineRecord,
    ShapeProfile,
    check_machine,
    engines_in,
    read_engine,
    system_name,
    write_record,
)
from holov_export.errors import BundleError, EngineError, IntegrityError
from holov_export.gpu import Gpu
from holov_export.spec import Precision

H200 = Gpu(name="NVIDIA H200", sm=90, memory_bytes=2**37, integrated=False, cuda="13.0")
L4 = Gpu(name="NVIDIA L4", sm=89, memory_bytes=2**34, integrated=False, cuda="12.4")
ORIN = Gpu(name="Orin", sm=87, memory_bytes=2**35, integrated=True, cuda="12.6")


def record(**built: object) -> EngineRecord:
    made = {"tensorrt": "10.3.0", "cuda": "12.6", "gpu": "NVIDIA H200", "sm": 90, "system": system_name()}
    return EngineRecord(
        schema_version=SCHEMA,
        target="h200",
        precision=Precision.FP16,
        opset=18,
        profiles=(ShapeProfile(batch=(1, 1, 4), budget=(1, 64, 576)),),
        graph_sha256="0" * 64,
        weights_sha256="1" * 64,
        sha256="2" * 64,
        bytes=1,
        built_with=BuiltWith.model_validate({**made, "network": "strongly-typed", **built}),
        build_seconds=1.0,
        created="2026-01-01T00:00:00+00:00",
    )


def test_the_machine_that_built_it_runs_it() -> None:
    check_machine(record(), H200, "10.3.0")


@pytest.mark.parametrize(
    ("built", "gpu", "tensorrt", "words"),
    [
        ({}, L4, "10.3.0", "sm_90.*this GPU is NVIDIA L4"),
        ({}, H200, "10.3.1", "built by TensorRT 10.3.0, this machine has 10.3.1"),
        ({}, H200, "10.3.0.post1", "built by TensorRT"),
        ({"system": "Plan9 sparc"}, H200, "10.3.0", "built on Plan9 sparc"),
        ({"version_compatible": True}, H200, "10.2.0", "built by TensorRT"),
        ({"version_compatible": True}, H200, "8.6.1", "built by TensorRT"),
        ({"version_compatible": True, "tensorrt": "8.6.1"}, H200, "11.4.0", "built by TensorRT"),
        ({"hardware_compatibility": "ampere_plus"}, ORIN, "10.3.0", "this GPU is Orin"),
        ({"hardware_compatibility": "same_compute_capability"}, L4, "10.3.0", "this GPU is NVIDIA L4"),
    ],
)
def test_others_are_refused(built: dict[str, object], gpu: Gpu, tensorrt: str, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        check_machine(record(**built), gpu, tensorrt)
    assert "compile" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("built", "gpu", "tensorrt"),
    [
        ({"version_compatible": True}, H200, "10.16.1"),
        ({"version_compatible": True}, H200, "11.4.0"),
        ({"version_compatible": True, "tensorrt": "8.6.1"}, H200, "10.3.0"),
        ({"hardware_compatibility": "ampere_plus"}, L4, "10.3.0"),
    ],
)
def test_what_was_made_compatible_runs_elsewhere(built: dict[str, object], gpu: Gpu, tensorrt: str) -> None:
    check_machine(record(**built), gpu, tensorrt)


class TestRecords:
    def test_round_trip(self, tmp_path: Path) -> None:
        (tmp_path / "h200").mkdir()
        write_record(tmp_path / "h200", record())
        (found,) = engines_in(tmp_path)
        assert found.record == record()
        assert engines_in(tmp_path / "nowhere") == []

    def test_folders_without_a_record_are_no_engines(self, tmp_path: Path) -> None:
        (tmp_path / "h200").mkdir()
        (tmp_path / "file").write_text("x")
        assert engines_in(tmp_path) == []
        with pytest.raises(BundleError, match="holds no engine"):
            read_engine(tmp_path / "h200")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', "\x00"])
    def test_damaged(self, tmp_path: Path, text: str) -> None:
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(IntegrityError, match="does not parse"):
            read_engine(tmp_path)

    def test_another_schema(self, tmp_path: Path) -> None:
        write_record(tmp_path, record().model_copy(update={"schema_version": SCHEMA + 1}))
        with pytest.raises(BundleError, match="Compile the engine again"):
            read_engine(tmp_path)

    def test_records_from_before_further_axes_are_read(self, tmp_path: Path) -> None:
        written = record().model_dump(mode="json")
        for profile in written["profiles"]:
            del profile["axes"]
        (tmp_path / RECORD).write_text(json.dumps({**written, "schema_version": 1}))
        assert read_engine(tmp_path).record.profiles == record().profiles

    def test_further_axes(self, tmp_path: Path) -> None:
        profile = ShapeProfile(batch=(1, 1, 2), budget=(1, 9, 80), axes=(AxisSpan(name="views", span=(3, 5, 10)),))
        write_record(tmp_path, record().model_copy(update={"profiles": (profile,)}))
        assert read_engine(tmp_path).record.profiles == (profile,)
        for views, held in ((2, False), (3, True), (10, True), (11, False)):
            assert profile.holds(AxisSizes(1, 80, (AxisSize("views", views),))) is held
        assert profile.corners[1] == AxisSizes(1, 9, (AxisSize("views", 5),))

    def test_profiles_hold_what_lies_between(self) -> None:
        profile = ShapeProfile(batch=(2, 2, 4), budget=(1, 64, 576))
        assert profile.holds(AxisSizes(2, 576))
        assert profile.holds(AxisSizes(4, 1))
        assert not profile.holds(AxisSizes(1, 64))
        assert not profile.holds(AxisSizes(5, 64))
        assert not profile.holds(AxisSizes(2, 577))
