"""One weight file, several small graphs beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from holov_export.bundle import Bundle, open_bundle
from holov_export.errors import UnknownNameError, UsageError
from holov_export.pipeline import export_bundle, readiness_report
from holov_export.policies import POLICIES, HolovPolicy, policy_from_settings
from holov_export.request import ExportRequest, GraphRequest, plan_from_request
from holov_export.runtime.session import Session
from holov_export.spec import Precision

NAMES = ("holov", "scope", "cls-topk", "holov@1", "holov@0:30,2")


def request_of(
    checkpoint: Path, folder: Path | None, *names: str, precision: Precision = Precision.FP32
) -> ExportRequest:
    first, *also = [
        GraphRequest(policy_from_settings(rule), layers or None)
        for rule, _, layers in (name.partition("@") for name in names)
    ]
    return ExportRequest(
        str(checkpoint), first.policy, precision, None, folder, select_layer=first.select_layer, also=tuple(also)
    )


@pytest.fixture(scope="module")
def several(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All graphs verified against torch and the reference while they are exported."""
    folder = tmp_path_factory.mktemp("several") / "bundle"
    export_bundle(request_of(llava_checkpoint, folder, *NAMES))
    return open_bundle(folder)


def outputs(path: Path, bundle: Bundle, budget: int) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    side = bundle.manifest.plan.model.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)
    feed = {"pixel_values": pixels, "budget": np.array([budget]), "quota": np.array([budget, 3])}
    found: list[np.ndarray] = session.run(None, feed)
    return found


def test_files(several: Bundle) -> None:
    assert several.methods == NAMES
    files = {item.path: item.bytes for item in several.manifest.artifacts}
    weights = [name for name in files if name.endswith(".data")]
    assert weights == ["vision.onnx.data"]
    for name in NAMES:
        assert files[several.of_method(name).graph] < 150_000
    assert {"reports/parity.json", "reports/parity-scope.json", "reports/readiness-holov-1.json"} <= set(files)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_all_in_the_shared_file(several: Bundle, name: str) -> None:
    model = onnx.load(several.of_method(name).vision, load_external_data=False)
    large = [item for item in model.graph.initializer if np.prod(item.dims) >= 1024]
    assert len(large) > 20
    for item in large:
        entries = {entry.key: entry.value for entry in item.external_data}
        assert entries["location"] == "vision.onnx.data", item.name


@pytest.mark.parametrize("name", NAMES[1:4])
def test_a_graph_beside_others_is_the_graph_alone(
    several: Bundle, name: str, llava_checkpoint: Path, tmp_path: Path
) -> None:
    request = request_of(llava_checkpoint, tmp_path / "alone", name)
    alone, _ = export_bundle(request)
    assert alone.methods == (name,)
    ours, theirs = outputs(several.of_method(name).vision, several, 9), outputs(alone.vision, alone, 9)
    for left, right in zip(ours, theirs, strict=True):
        assert np.array_equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_other_precisions_share_weights_too(precision: Precision, llava_checkpoint: Path, tmp_path: Path) -> None:
    request = request_of(llava_checkpoint, tmp_path / "half", "holov", "scope", "holov@1", precision=precision)
    bundle, _ = export_bundle(request)
    files = {item.path: item.bytes for item in bundle.manifest.artifacts}
    assert all(files[bundle.of_method(name).graph] < 150_000 for name in bundle.methods)
    for name in bundle.methods:
        model = onnx.load(bundle.of_method(name).vision)  # reads the weights where they are said to be
        onnx.checker.check_model(model)


def test_each_graph_is_checked_for_tensorrt(several: Bundle) -> None:
    for name in NAMES:
        report = readiness_report(several.of_method(name))
        assert report.graph.endswith(name)
        assert report.ready, [item for version in report.versions for item in version.findings]


def test_a_session_takes_the_graph_by_name(several: Bundle, photographs: list) -> None:  # type: ignore[type-arg]
    kept = {}
    for name in NAMES:
        with Session.open(several, method=name, decoder="none", provider="cpu") as session:
            assert session.bundle.method == name
            kept[name] = session.see(photographs[0], budget=9).positions[0].tolist()
    with Session.open(several, decoder="none", provider="cpu") as session:
        assert session.see(photographs[0], budget=9).positions[0].tolist() == kept["holov"]
    assert len({tuple(row) for row in kept.values()}) >= 4
    with pytest.raises(UnknownNameError, match="no graph for 'divprune'"):
        Session.open(several, method="divprune", decoder="none")


def test_a_schedule_names_the_usual_budget(llava_checkpoint: Path) -> None:
    request = ExportRequest(
        str(llava_checkpoint), HolovPolicy(), Precision.FP32, None, Path("never"), select_layer="0:30,2:5"
    )
    plan, _ = plan_from_request(request)
    assert (plan.method, plan.budget) == ("holov@0:30,2", 5)
    assert plan_from_request(request_of(llava_checkpoint, None, "holov@1"))[1].name.endswith("-holov-1-fp32")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("holov@9",), "behind the feature layer"),
        (("holov@x",), "is no LAYER"),
        (("holov-official@1",), "feature layer only"),
        (("uniform@0:9,1",), "decides once"),
        (("holov", "holov"), "the same name"),
    ],
)
def test_requests_that_are_refused(names: tuple[str, ...], reason: str, llava_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        plan_from_request(request_of(llava_checkpoint, tmp_path / "never", *names))
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_every_rule_in_one_bundle(llava_checkpoint: Path, tmp_path: Path) -> None:
    bundle, report = export_bundle(request_of(llava_checkpoint, tmp_path / "all", *POLICIES))
    assert report is not None
    assert report.passed
    assert bundle.methods == tuple(POLICIES)
