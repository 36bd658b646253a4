"""Engines of all graphs of one bundle, against the stand-ins: each computes what ONNX Runtime does, each is its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorrt_standin
from tensorrt_standin import VERSIONS, FakeGpu

from holov_export.bundle import Bundle, open_bundle
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.errors import EngineError
from holov_export.pipeline import export_bundle
from holov_export.policies import policy_from_settings
from holov_export.request import ExportRequest, GraphRequest
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.spec import Precision
from holov_export.targets import target_from_name
from holov_export.tensors import PixelBatch

NAMES = (
    *("holov", "holov-plus", "scope", "divprune", "visionzip", "dart", "cdpruner-unconditional"),
    *("holov@1", "scope@0:30,2"),
)
TARGET = target_from_name("h200")


@pytest.fixture(scope="module", params=[Precision.FP32, Precision.FP16])
def bundle(request: pytest.FixtureRequest, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("engines") / request.param.value
    first, *also = [
        GraphRequest(policy_from_settings(rule), layers or None)
        for rule, _, layers in (name.partition("@") for name in NAMES)
    ]
    export_bundle(
        ExportRequest(str(llava_checkpoint), first.policy, request.param, None, folder, verify=False, also=tuple(also))
    )
    return open_bundle(folder)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_each_graph_has_an_engine_of_its_own(
    name: str, version: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    view = bundle.of_method(name)
    side = bundle.manifest.plan.model.vision.image_size
    values = np.random.default_rng(3).standard_normal((3, 3, side, side)).astype(np.float32)
    pixels = PixelBatch(values, (), ())
    with OrtRunner(view) as ort:
        expected = ort.run(pixels, 20, [20, 9, 1], saliency=True)
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        engine = engine_from_bundle(view, TARGET)
        assert engine.folder.parent == bundle.folder / "engines"
        assert engine.folder.name.startswith("h200")
        with TrtRunner(view, target="h200") as runner:
            found = runner.run(pixels, 20, [20, 9, 1], saliency=True)
        for other in bundle.methods:
            if other != name and not (bundle.folder / "engines").joinpath(f"h200-{other}").exists():
                with pytest.raises(EngineError, match="no engine"):
                    TrtRunner(bundle.of_method(other), target="h200")
                break
    assert np.array_equal(found.positions, expected.positions)
    assert np.array_equal(found.counts, expected.counts)
    assert np.array_equal(found.tokens, expected.tokens)
    for folder in (bundle.folder / "engines").iterdir():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink()
        folder.rmdir()
