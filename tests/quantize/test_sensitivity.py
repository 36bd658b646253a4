"""Sensitivity sweeps: what is ranked first, how few are kept, going on after a kill, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_bundles import family_bundle
from family_checkpoints import FAMILIES
from float_graphs import FP8, INT8, feed_of, ranges_of, write_vivid
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.cli.sensitivity_text import option_text, print_sensitivity
from holov_export.errors import ImageError, StorageError, UsageError
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovOfficialPolicy, HolovPolicy, policy_from_settings
from holov_export.quantize.linears import linears_of
from holov_export.quantize.precision_report import vision_verdicts
from holov_export.quantize.probe_graph import probe_from_graph
from holov_export.quantize.probe_losses import probe_picture, seen_with
from holov_export.quantize.probe_runner import ProbeRunner
from holov_export.quantize.qdq import write_quantized
from holov_export.quantize.ranges import Ranges
from holov_export.quantize.sensitivity import runs_of, sensitivity_of
from holov_export.quantize.sensitivity_record import Measured, Sensitivity
from holov_export.quantize.sensitivity_search import RETRIED, fewest, needed
from holov_export.recipes import Limits, NamedPicture
from holov_export.request import ExportRequest, GraphRequest
from holov_export.spec import Precision, Quantization, QuantizedType
from holov_export.storage import sha256_of
from holov_export.verify.pictures import pixels_for
from holov_export.verify.vision_loss import vision_losses

CPU = Quantization(type=QuantizedType.INT8, engine="cpu")
#: met once the fragile layer is kept
LIMITS = Limits(overlap=0.75, cosine=0.99)
LOOSE = Limits(overlap=0.0, cosine=-1.0)
_FRAGILE = "vision_tower.layers.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def pictures(photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> tuple[NamedPicture, ...]:
    folder, made = tmp_path_factory.mktemp("pictures"), []
    for place, picture in enumerate(photographs[:2]):
        path = folder / f"picture_{place}.png"
        picture.resize((80, 70)).save(path)
        made.append(NamedPicture(path.name, sha256_of(path), path))
    return tuple(made)


def _view(bundle: Bundle, folder: Path, *, fragile: bool) -> Bundle:
    """The tiny bundle's graph with drawn norms.

    In a fragile layer, a channel that is always zero has weights so large that the others are rounded to nothing.
    """
    graph = write_vivid(bundle.vision, folder / "vision.onnx", outliers=1)
    if fragile:
        model = onnx.load(graph)
        (linear,) = (item for item in linears_of(model) if item.weight == _FRAGILE)
        (norm,) = (node for node in model.graph.node if node.output[0] == linear.activations[0])
        _change(model, norm.input[1], lambda values: values * (np.arange(len(values)) > 0))
        _change(model, norm.input[2], lambda values: values * (np.arange(len(values)) > 0))
        _change(model, _FRAGILE, lambda values: np.vstack([np.full_like(values[:1], 500), 4 * values[1:]]))
        onnx.save(model, graph, save_as_external_data=True, location="fragile.data", size_threshold=256)
    return replace(bundle, folder=folder)


def _change(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = (item for item in model.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), name))


@pytest.fixture(scope="module")
def fragile(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _view(exported_bundle, tmp_path_factory.mktemp("fragile"), fragile=True)


def _ranges(view: Bundle, pictures: Sequence[NamedPicture]) -> Ranges:
    return ranges_of(view.vision, [feed_of(view, [picture.image() for picture in pictures], view.manifest.plan.tokens)])


def _swept(
    view: Bundle,
    pictures: Sequence[NamedPicture],
    limits: Limits,
    quantization: Quantization = INT8,
    *,
    partial: Path | None = None,
    whole_layers: bool = False,
) -> Sensitivity:
    ranges = None if quantization.engine == "cpu" else _ranges(view, pictures)
    return sensitivity_of(
        view, quantization, ranges, pictures, limits=limits, partial=partial, whole_layers=whole_layers, threads=1
    )


# --------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("kind", ["int8", "fp8", "cpu"])
def test_a_fragile_layer_comes_first(fragile: Bundle, pictures: tuple[NamedPicture, ...], kind: str) -> None:
    quantization = {"int8": INT8, "fp8": FP8, "cpu": CPU}[kind]
    found = _swept(fragile, pictures, LIMITS, quantization)
    first, second = found.groups[:2]
    if kind == "fp8":  # an 8-bit float has small steps for small values: nothing is fragile in this way
        assert first.damage < 10 * second.damage
        return
    assert first.name == "layers.1.mlp"
    assert first.damage > 2 * second.damage
    assert first.linears == tuple(f"vision_tower.layers.1.mlp.{part}" for part in ("fc1", "fc2"))
    assert found.keep == ("layers.1.mlp",)
    assert found.met
    by_kept = {point.kept: point for point in found.curve}
    assert not by_kept[()].met
    assert by_kept["layers.1.mlp",].saliency_error < 0.5 * by_kept[()].saliency_error  # type: ignore[operator]
    assert by_kept["layers.1.mlp",].share > by_kept[()].share
    for point in found.curve:
        assert point.met == (point.overlap >= 0.75 and point.cosine >= 0.99)  # type: ignore[operator]
    assert by_kept[()].cosine < by_kept["layers.1.mlp",].cosine < 1  # type: ignore[operator]


def test_what_is_proposed_is_within_the_limits_of_the_gate(
    exported_bundle: Bundle, pictures: tuple[NamedPicture, ...], tmp_path: Path
) -> None:
    """The graph that is written with the proposed option, judged as an export is, on the same pictures."""
    view = _view(exported_bundle, tmp_path, fragile=True)
    limits, ranges = LIMITS, _ranges(view, pictures)
    after = replace(view, folder=tmp_path / "quantized")
    after.folder.mkdir()
    for keep, passes in (((), False), (_swept(view, pictures, limits).keep, True)):
        quantization = INT8.model_copy(update={"keep": keep})
        write_quantized(view.vision, after.vision, quantization, ranges)
        losses = vision_losses(view, after, [(picture.name, picture.image()) for picture in pictures], threads=1)
        assert all(verdict.passed for verdict in vision_verdicts(losses, limits)) is passes


def test_nothing_is_kept_where_nothing_needs_to_be(fragile: Bundle, pictures: tuple[NamedPicture, ...]) -> None:
    found = _swept(fragile, pictures, LOOSE, INT8.model_copy(update={"keep": ("layers.0", "fc2")}))
    assert found.met
    assert found.keep == ("layers.0", "fc2"), "what was kept from the start stays in the option"
    assert [point.kept for point in found.curve] == [()]
    assert all("layers.0" not in group.name for group in found.groups)
    assert option_text(_swept(fragile, pictures, LOOSE)) == "nothing needs to be kept: quantise without --keep"


def test_says_so_where_no_set_is_enough(fragile: Bundle, pictures: tuple[NamedPicture, ...]) -> None:
    found = _swept(fragile, pictures, Limits(overlap=1.0, cosine=1.0), whole_layers=True)
    assert not found.met
    assert len(found.curve[-1].kept) == len(found.groups) - 1, "all but one were tried"
    assert option_text(found).startswith("no set within the limits was found; the best: --keep ")
    best = max(found.curve, key=lambda point: (point.overlap, point.cosine))
    assert set(found.keep) == set(best.kept)


def test_shares_are_of_the_whole_work(fragile: Bundle, pictures: tuple[NamedPicture, ...]) -> None:
    found = _swept(fragile, pictures, LOOSE)
    (nothing_kept,) = found.curve
    assert 0 < nothing_kept.share < 0.2, "the products that decide"
    assert sum(group.share for group in found.groups) == pytest.approx(1 - nothing_kept.share)


def test_counts_its_runs(fragile: Bundle, pictures: tuple[NamedPicture, ...]) -> None:
    heard, told = [], []
    found = sensitivity_of(
        fragile,
        INT8,
        _ranges(fragile, pictures),
        pictures,
        limits=LIMITS,
        threads=1,
        tell=told.append,
        advance=heard.append,
    )
    assert found.runs <= sum(heard) <= runs_of(fragile, INT8, len(pictures))
    assert any("7 groups alone, 2 runs of the graph each" in line for line in told), told


def test_refuses_what_says_nothing(fragile: Bundle, pictures: tuple[NamedPicture, ...]) -> None:
    with pytest.raises(ImageError, match="no picture"):
        sensitivity_of(fragile, INT8, _ranges(fragile, pictures), (), limits=LOOSE)


def test_refuses_a_float_graph_that_is_broken(
    exported_bundle: Bundle, pictures: tuple[NamedPicture, ...], tmp_path: Path
) -> None:
    view = _view(exported_bundle, tmp_path, fragile=False)
    ranges, model = _ranges(view, pictures), onnx.load(view.vision)
    _change(model, "vision_tower.layers.0.mlp.fc1.weight", lambda values: values * np.inf)
    onnx.save(model, view.vision)
    with pytest.raises(UsageError, match=r"not finite for 'picture_0\.png', before anything is quantised"):
        sensitivity_of(view, INT8.model_copy(update={"keep": ("layers.0",)}), ranges, pictures, limits=LOOSE)


# --------------------------------------------------------------------------------------- the search


@given(st.integers(0, 60), st.integers(0, 60))
def test_fewest_is_the_smallest(most: int, first: int) -> None:
    asked: list[int] = []

    def good(count: int) -> bool:
        asked.append(count)
        return count >= first

    assert fewest(most, good) == (first if first <= most else None)
    assert all(0 <= count <= most for count in asked)
    assert len(asked) == len(set(asked)) <= 2 * max(1, most).bit_length() + 2


def test_needed_drops_what_is_good_without() -> None:
    assert needed(list("abcdef"), lambda kept: {"b", "e"} <= set(kept)) == ["a"] * 0 + ["b", "e"]
    many = [f"g{place}" for place in range(RETRIED + 3)]
    assert needed(many, lambda kept: True) == many[:3], "no more than that are tried"
    assert needed(many, lambda kept: False) == many


# --------------------------------------------------------------------------------------- going on


class KilledError(Exception):
    """What stops a sweep here."""


def _killed_after(view: Bundle, pictures: Sequence[NamedPicture], runs: int, partial: Path, limits: Limits) -> None:
    left = [runs]

    def advance(count: int) -> None:
        left[0] -= count
        if left[0] <= 0:
            raise KilledError

    with pytest.raises(KilledError):
        sensitivity_of(
            view, INT8, _ranges(view, pictures), pictures, limits=limits, partial=partial, threads=1, advance=advance
        )


def test_goes_on_where_it_was_killed(fragile: Bundle, pictures: tuple[NamedPicture, ...], tmp_path: Path) -> None:
    limits, partial = LIMITS, tmp_path / "deep" / "sweep.jsonl"
    whole = _swept(fragile, pictures, limits)
    _killed_after(fragile, pictures, 8, partial, limits)
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4, "a header and three mixtures: the fourth was not over"
    # a mark that only a line that was read again can have
    mark = Measured.model_validate_json(lines[2]).model_copy(update={"saliency_error": 77.0})
    partial.write_bytes(
        b"".join((lines[0], lines[1], mark.model_dump_json().encode() + b"\n", lines[3], b'{"kept": ['))
    )
    resumed = _swept(fragile, pictures, limits, partial=partial)
    assert max(group.saliency_error or 0.0 for group in resumed.groups) == 77.0
    same = {group.name: group for group in whole.groups}
    assert sum(group == same[group.name] for group in resumed.groups) == len(whole.groups) - 1
    assert all(json.loads(line) for line in partial.read_text().splitlines()), "the torn line is gone"


@pytest.mark.parametrize("change", ["keep", "pictures", "ranges"])
def test_begins_anew_where_something_else_was_measured(
    fragile: Bundle, pictures: tuple[NamedPicture, ...], tmp_path: Path, change: str
) -> None:
    partial = tmp_path / "sweep.jsonl"
    _killed_after(fragile, pictures, 4, partial, LOOSE)
    before = partial.read_bytes().splitlines()
    quantization, seen, ranges = INT8, pictures, _ranges(fragile, pictures)
    if change == "keep":
        quantization = INT8.model_copy(update={"keep": ("layers.0",)})
    elif change == "pictures":
        seen = pictures[::-1]
    else:
        wider = {name: item.model_copy(update={"high": item.high * 2}) for name, item in ranges.record.tensors.items()}
        ranges = Ranges(ranges.record.model_copy(update={"tensors": wider}), ranges.channels)
    sensitivity_of(fragile, quantization, ranges, seen, limits=LOOSE, partial=partial, threads=1)
    after = partial.read_bytes().splitlines()
    assert after[0] != before[0]
    assert not set(before) & set(after)


def test_says_where_it_cannot_write(fragile: Bundle, pictures: tuple[NamedPicture, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        _swept(fragile, pictures, LOOSE, partial=tmp_path / "file" / "sweep.jsonl")


# --------------------------------------------------------------------------------------- what is said


def test_text_and_json(fragile: Bundle, pictures: tuple[NamedPicture, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = _swept(fragile, pictures, LIMITS)
    print_sensitivity(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "--keep layers.1.mlp"
    assert sum("layers." in line and "█" in line for line in lines) >= len(found.groups) - 2
    assert any(line.startswith("nothing more") and line.rstrip().endswith("missed") for line in lines)
    print_sensitivity(found, as_json=True)
    assert Sensitivity.model_validate(json.loads(capsys.readouterr().out)) == found


# --------------------------------------------------------------------------------------- other graphs


@pytest.fixture(scope="module")
def further(exported_bundle: Bundle, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint with rules that are run at each budget."""
    request = ExportRequest(
        str(llava_checkpoint),
        HolovPolicy(),
        Precision.FP32,
        None,
        tmp_path_factory.mktemp("bundles") / "further",
        verify=False,
        also=(GraphRequest(policy_from_settings("scope")), GraphRequest(HolovOfficialPolicy())),
    )
    return export_bundle(request)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["holov", "scope", "holov-official"])
def test_one_run_tells_what_a_run_at_each_budget_does(
    further: Bundle, pictures: tuple[NamedPicture, ...], method: str
) -> None:
    view = further.of_method(method)
    plan = view.manifest.plan
    pixels = pixels_for(plan, [pictures[0].image()])
    ranges = _ranges(view, pictures)
    probe = probe_from_graph(view.vision, INT8, ranges)
    names = [group.name for group in probe.groups]
    with ProbeRunner(probe, plan, threads=1) as runner:
        picture = probe_picture(runner, plan, "one", pixels, 64, [7, 21, 64, 7])
        assert picture.quotas == (7, 21, 64)
        assert picture.at_once is (method == "holov")
        for on in ((), names[:2], names):
            found = seen_with(runner, plan, picture, on)
            for quota, seen in zip(picture.quotas, found, strict=True):
                run = runner.run(pixels, [quota], quantized=on)
                np.testing.assert_array_equal(seen.positions, run.positions)
                np.testing.assert_allclose(seen.tokens, run.tokens, atol=1e-5)
    swept = sensitivity_of(view, INT8, ranges, pictures, limits=LIMITS, threads=1)
    assert swept.method == method
    assert len(swept.groups) == 7


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    family: str, pictures: tuple[NamedPicture, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = family_bundle(family, Precision.FP32, tmp_path_factory)
    for view in bundle.views[:: len(bundle.methods)]:
        found = sensitivity_of(view, CPU, None, pictures, limits=LOOSE, threads=1)
        assert found.met
        assert all(group.damage >= 0 for group in found.groups)
        assert found.part == view.part
