"""Profiles of packed graphs: every picture and clip that a model can have lies in them, and nothing else is needed."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import tensorrt_standin
from engine_bundles import family_bundle
from family_checkpoints import write_family
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_standin import VERSIONS, FakeGpu

from holov_export.bundle import Bundle
from holov_export.cli import run
from holov_export.compile.compilation import CompileOptions, CompilePlan, plan_from_target
from holov_export.compile.packed_profiles import LONGEST_SORT, most_windows, usual_windows
from holov_export.compile.trtexec import trtexec_from_plan
from holov_export.engine import AxisSize, AxisSizes, engines_in
from holov_export.errors import BudgetError, EngineError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.policies import policy_from_settings
from holov_export.runtime.packing import packed_inputs
from holov_export.runtime.preprocess_patches import patch_layout, patch_size_of, window_order
from holov_export.spec import CheckpointSource, ExportPlan, ModelSpec, PatchImageSpec, Precision, QwenVisionSpec
from holov_export.targets import list_targets, target_from_name
from holov_export.tensors import CropBox, ImageLayout, Region

H200 = target_from_name("h200")
FAMILIES = ("llava_next", "qwen2_5_vl", "video_llava")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    made = {}
    for family in FAMILIES:
        folder = write_family(tmp_path_factory.mktemp("specs") / family, family)
        made[family] = spec_from_checkpoint(folder, family)
    return made


def export_plan(model: ModelSpec, method: str = "holov", **changes: object) -> ExportPlan:
    """The plan of the packed graph."""
    plan = ExportPlan(
        model=model,
        source=CheckpointSource(kind="local", name="tiny"),
        policy=policy_from_settings(method),
        precision=Precision.FP16,
        decoder=None,
        part="video" if model.family == "video_llava" else "image",
    )
    return plan.model_copy(update=changes)


def compiled(plan: ExportPlan, **options: object) -> CompilePlan:
    asked = {"profiles": ("batch=1:2:4,budget=1:9:all",), **options}
    return plan_from_target(plan, H200, CompileOptions(**asked), "10.3.0")  # type: ignore[arg-type]


def axes_of(plan: CompilePlan, index: int = 0) -> dict[str, tuple[int, int, int]]:
    profile = plan.profiles[index]
    return {"batch": profile.batch, "budget": profile.budget, **{axis.name: axis.span for axis in profile.axes}}


# ------------------------------------------------------------------------------------------------------- profiles


def test_tiles(specs: dict[str, ModelSpec]) -> None:
    """Two to four tiles beside the whole picture, 16 tokens each; the smallest picture has the whole one's."""
    plan = compiled(export_plan(specs["llava_next"]))
    assert axes_of(plan) == {
        "batch": (1, 2, 4), "budget": (1, 9, 80), "views": (3, 10, 20), "tokens": (16, 80, 80),
    }  # fmt: skip
    assert len(plan.profiles) == 1
    assert axes_of(compiled(export_plan(specs["llava_next"]), max_tokens=60))["tokens"] == (16, 60, 60)


def test_the_true_llava_next(specs: dict[str, ModelSpec]) -> None:
    """576 tokens a view and 2880 of the largest picture, three to five views."""
    tiny = specs["llava_next"]
    points = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    model = tiny.model_copy(
        update={
            "image": tiny.image.model_copy(update={"pinpoints": points}),
            "vision": tiny.vision.model_copy(update={"image_size": 336}),
        }
    )
    made = axes_of(compiled(export_plan(model), profiles=("batch=1,budget=1:1/9:all",)))
    assert made == {"batch": (1, 1, 1), "budget": (1, 320, 2880), "views": (3, 5, 5), "tokens": (576, 2880, 2880)}


def test_clips_of_frames_are_rows_of_frames_or_of_clips(specs: dict[str, ModelSpec]) -> None:
    """8 frames of 17 tokens; a frame gets an eighth of the budget, rounded up."""
    plan = compiled(export_plan(specs["video_llava"]), profiles=("batch=1:2:4,budget=1:20:100",))
    assert axes_of(plan, 0) == {
        "batch": (1, 16, 32), "budget": (1, 3, 13), "views": (8, 16, 32), "tokens": (17, 17, 17),
    }  # fmt: skip
    assert axes_of(plan, 1) == {
        "batch": (1, 2, 4), "budget": (1, 20, 100), "views": (8, 16, 32), "tokens": (136, 136, 136),
    }  # fmt: skip


def test_a_rule_that_does_not_spread_sees_whole_clips_only(specs: dict[str, ModelSpec]) -> None:
    plan = export_plan(specs["video_llava"], "holov-official")
    assert not plan.policy.spreads
    (profile,) = compiled(plan).profiles
    assert profile.batch == (1, 2, 4)


def test_pictures_are_square_graphs_where_they_have_a_tower_of_their_own(specs: dict[str, ModelSpec]) -> None:
    (profile,) = compiled(export_plan(specs["video_llava"], part="image")).profiles
    assert profile.axes == ()
    assert (profile.batch, profile.budget) == ((1, 2, 4), (1, 9, 16))


def test_patches(specs: dict[str, ModelSpec]) -> None:
    """200 tokens of 4 patches, windows of 2 x 2 tokens; the pictures alone."""
    plan = export_plan(specs["qwen2_5_vl"])
    made = compiled(plan, max_tokens=200)
    assert axes_of(made) == {
        "batch": (1, 2, 4),
        "budget": (1, 9, 200),
        "patches": (4, 1600, 3200),
        "windows": (1, 98, 400),
        "views": (1, 2, 4),
        "longest": (4, 800, 800),
        "tokens": (1, 200, 200),
    }
    assert len(made.profiles) == 1


def test_clips_of_pairs_have_a_profile_of_their_own(specs: dict[str, ModelSpec]) -> None:
    """Up to four pairs, 200 tokens together: of one pair up to 48, for that is the model's largest frame."""
    made = compiled(export_plan(specs["qwen2_5_vl"]), max_tokens=200, clip_frames=7)
    assert axes_of(made, 1) == {
        "batch": (1, 8, 16),
        "budget": (1, 3, 200),
        "patches": (4, 1536, 3200),
        "windows": (1, 4 * 2 * 9, 4 * 4 * 24),
        "views": (1, 8, 16),
        "longest": (4, 192, 192),
        "tokens": (1, 48, 200),
    }
    assert len(compiled(export_plan(specs["qwen2_5_vl"]), clip_frames=2).profiles) == 1  # one pair is like a picture


def test_usual_largest_pictures() -> None:
    """A board cannot tune for the 16384 tokens that Qwen2.5-VL allows, and TensorRT cannot sort them."""
    model = QWEN_7B
    assert axes_of(compiled(export_plan(model)))["tokens"] == (1, 1280, 1280)
    assert axes_of(compiled(export_plan(model)))["budget"] == (1, 9, 1280)
    assert axes_of(compiled(export_plan(model), max_tokens=LONGEST_SORT))["tokens"][2] == LONGEST_SORT
    with pytest.raises(EngineError, match="3840 tokens at most") as caught:
        compiled(export_plan(model), max_tokens=LONGEST_SORT + 1)
    assert "--engine ort" in caught.value.hint
    official = export_plan(model, "holov-official")
    assert official.start_counts  # it sorts the word before the picture as well
    with pytest.raises(EngineError, match="3839 tokens at most"):
        compiled(official, max_tokens=LONGEST_SORT)


def test_batches_that_no_memory_holds_are_made_smaller_unless_they_are_asked_for() -> None:
    """An attention map of 1280 tokens: 16 heads x 5120 x 5120 x 2 bytes; so many fit into an eighth of the memory."""
    vision = QWEN_VISION.model_copy(update={"heads": 16, "width": 1280})
    plan = export_plan(QWEN_7B.model_copy(update={"vision": vision}))
    for name, batches in (("l4", [1, 3]), ("jetson-orin-nano-8gb", [1]), ("rtx-4090", [1, 3])):
        target = target_from_name(name)
        made = plan_from_target(plan, target, CompileOptions(), target.tensorrt.max)
        assert [profile.batch[2] for profile in made.profiles] == batches
        assert batches[-1] == max(1, int(target.usable_bytes / 8 / (16 * 5120**2 * 2)))
    asked = plan_from_target(plan, target_from_name("l4"), CompileOptions(batch="1:4:32"), "10.3")
    assert [profile.batch for profile in asked.profiles] == [(1, 4, 32)]
    tiled = plan_from_target(export_plan(QWEN_7B), target_from_name("l4"), CompileOptions(max_tokens=64), "10.3")
    assert tiled.profiles[-1].batch[2] == 32


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llava_next", {"max_tokens": 15}, "16 tokens or more"),
        ("video_llava", {"max_tokens": 135}, "136 tokens or more"),
        ("llava_next", {"clip_frames": 8}, "no clips of unequal length"),
        ("video_llava", {"clip_frames": 8}, "no clips of unequal length"),
    ],
)
def test_what_cannot_be_is_refused(
    family: str, options: dict[str, int], said: str, specs: dict[str, ModelSpec]
) -> None:
    with pytest.raises(BudgetError, match=said):
        compiled(export_plan(specs[family]), **options)


def test_a_square_graph_has_no_largest_picture(specs: dict[str, ModelSpec]) -> None:
    for options in ({"max_tokens": 16}, {"clip_frames": 8}):
        with pytest.raises(BudgetError, match="each picture has 16 tokens"):
            compiled(export_plan(specs["video_llava"], part="image"), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_has_profiles_in_order(family: str, specs: dict[str, ModelSpec]) -> None:
    for target in list_targets():
        plan = plan_from_target(export_plan(specs[family]), target, CompileOptions(), target.tensorrt.min)
        names = {axis for item in plan.inputs for axis in item.shape if isinstance(axis, str)}
        for index, profile in enumerate(plan.profiles):
            axes = axes_of(plan, index)
            assert set(axes) == names | {"budget"}
            assert all(1 <= low <= usual <= high for low, usual, high in axes.values())
            assert all(sizes.budget <= sizes.of("tokens") for sizes in profile.corners)


# -------------------------------------------------------------------------------- what pictures can be, and profiles


QWEN_VISION = QwenVisionSpec(
    patch_size=14, temporal_patch_size=2, merge=2, window_size=112, width=64, layers=2, heads=4, mlp_width=88,
    activation="silu", full_layers=(1,), norm_eps=1e-6, theta=10000.0,
)  # fmt: skip
QWEN_IMAGE = PatchImageSpec(
    patch_size=14, merge=2, temporal=2, min_pixels=3136, max_pixels=12845056, mean=(0, 0, 0), std=(1, 1, 1)
)


def _qwen_7b() -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "family": "qwen2_5_vl",
            "name": "qwen2.5-vl-7b",
            "image": QWEN_IMAGE.model_dump(),
            "video": {
                "kind": "pairs", "fps": 2.0, "min_frames": 4, "max_frames": 768, "min_pixels": 128 * 784,
                "max_pixels": 768 * 784, "total_pixels": 90316800, "tokens_per_second": 2,
            },
            "vision": QWEN_VISION.model_dump(),
            "decoder": {
                "architecture": "qwen2_5_vl", "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16,
                "mlp_width": 96, "vocab_size": 300, "context": 4096, "image_token_id": 1, "bos_token_id": None,
                "eos_token_ids": (2,), "pad_token_id": 0, "mrope_sections": (2, 3, 3), "video_token_id": 3,
            },
            "prompt": {"chat_template": ""},
        }
    )  # fmt: skip


QWEN_7B = _qwen_7b()


def picture(width: int, height: int, most: int) -> ImageLayout:
    size = patch_size_of((width, height), QWEN_IMAGE, (QWEN_IMAGE.min_pixels, most * 784))
    return patch_layout("image", (Region((size[1] // 28, size[0] // 28), CropBox(0, 0, width, height)),), QWEN_VISION)


def sizes_of(layouts: list[ImageLayout], plan: ExportPlan, quota: int, spread: str) -> AxisSizes:
    packed = packed_inputs(layouts, plan, np.full(len(layouts), quota), spread)  # type: ignore[arg-type]
    shapes = {array.name: array.values.shape for array in packed.arrays}
    rows = {
        "patches": sum(layout.rows for layout in layouts),
        "windows": shapes["window_rows"][0],
        "views": shapes["view_rows"][0],
        "longest": shapes["view_rows"][1],
        "tokens": shapes["source"][1],
    }
    further = tuple(AxisSize(name, size) for name, size in rows.items())
    return AxisSizes(len(packed.rows), packed.budget, further)


@settings(max_examples=60, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=4),
    quota=st.integers(1, 400),
)
def test_every_picture_up_to_the_largest_runs(sides: list[tuple[int, int]], quota: int) -> None:
    plan = export_plan(QWEN_7B)
    (profile,) = compiled(plan, profiles=("batch=1:2:4,budget=1:64:400",), max_tokens=400).profiles
    pictures = [picture(*side, 400) for side in sides if max(side) <= 200 * min(side)]
    if pictures:
        assert profile.holds(sizes_of(pictures, plan, quota, "frames"))


@settings(max_examples=60, deadline=None)
@given(
    clips=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=2),
    quota=st.integers(1, 400),
    spread=st.sampled_from(["frames", "clip"]),
)
def test_every_clip_up_to_the_largest_runs(clips: list[tuple[int, int, int]], quota: int, spread: str) -> None:
    """Clips of up to 8 frames and 400 tokens: each alone, and two that are both clips together."""
    plan = export_plan(QWEN_7B)
    profiles = compiled(plan, profiles=("batch=1:1:2,budget=1:64:400",), max_tokens=400, clip_frames=8).profiles
    layouts = [
        patch_layout("video", (Region(grid, CropBox(0, 0, 1, 1)),) * pairs, QWEN_VISION)
        for pairs, *grid in clips
        if pairs * math.prod(grid) <= 400
    ]
    for layout in layouts:
        sizes = sizes_of([layout], plan, quota, spread)
        assert any(profile.holds(sizes) for profile in profiles)
    several = [layout for layout in layouts if len(layout.regions) > 1]
    if several:
        assert profiles[1].holds(sizes_of(several, plan, quota, spread))


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 300))
def test_most_windows_are_those_of_the_worst_view(tokens: int) -> None:
    counted = max(len(window_order(rows, tokens // rows, QWEN_VISION)[1]) for rows in range(1, tokens + 1))
    assert most_windows(tokens, QWEN_VISION) == counted
    assert 1 <= usual_windows(tokens, QWEN_VISION) <= counted


# -------------------------------------------------------------------------------------------------- commands, builds


def test_trtexec_names_every_input(specs: dict[str, ModelSpec]) -> None:
    plan = compiled(export_plan(specs["qwen2_5_vl"]), profiles=("batch=1:1:2,budget=1:9:100",), max_tokens=100)
    arguments = trtexec_from_plan(plan, Path("vision.onnx")).arguments
    most = next(item for item in arguments if item.startswith("--maxShapes="))
    shapes = dict(part.split(":") for part in most.partition("=")[2].split(","))
    assert list(shapes) == [*(item.name for item in plan.inputs if item.name != "budget"), "budget"]
    assert shapes["pixel_values"] == f"800x{2 * 3 * 14 * 14}"
    assert (shapes["window_rows"], shapes["view_rows"], shapes["view_slots"]) == ("100x16", "2x400", "800")
    assert (shapes["source"], shapes["quota"], shapes["budget"]) == ("2x100", "2", "100")
    assert "--minShapes" in {item.partition("=")[0] for item in arguments}


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return family_bundle(request.param, Precision.FP16, tmp_path_factory)


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_the_command_builds_an_engine_of_every_graph(
    bundle: Bundle, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["compile", str(bundle.folder), "--target", "h200", "-o", str(tmp_path / "engines")]
    with tensorrt_standin.installed(version, gpu=FakeGpu()):
        for method in bundle.methods:
            assert run([*arguments, "--batch", "1:1:2", "--method", method]) == 0
        capsys.readouterr()
        assert run([*arguments, "--batch", "1:1:2", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert run([*arguments, "--batch", "1:1:2"]) == 0
    found = capsys.readouterr().out
    engines = {engine.folder.name: engine.record for engine in engines_in(tmp_path / "engines")}
    parts = bundle.manifest.plan.parts
    labels = ["h200", *(f"h200-{method}" for method in bundle.methods[1:])]
    assert set(engines) == {f"{label}{end}" for label in labels for end in ("", "-video")[: len(parts)]}
    packed = engines["h200-video" if len(parts) > 1 else "h200"]
    assert packed.profiles[0].axes[-1].name == "tokens"
    assert len({record.graph_sha256 for record in engines.values()}) == len(engines)
    assert len({record.weights_sha256 for record in engines.values()}) == len(parts)
    assert "tokens" in found
    assert ("sees" in found) == (len(parts) > 1)
    assert len(told.get("graphs", [told])) == len(parts)


def test_a_dry_run_shows_what_is_typed_for_every_graph(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", str(bundle.folder), "--target", "h200", "--dry-run", "--tensorrt", "10.3"]
    assert run(arguments) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("trtexec ")]
    files = [f"--onnx={bundle.folder / name}" for name in ("vision.onnx", "vision-video.onnx")]
    assert [line[1] for line in lines] == files[: len(bundle.manifest.plan.parts)]
    assert any(item.startswith("--maxShapes=") and "source:" in item for item in lines[-1])
    if len(bundle.manifest.plan.parts) > 1:
        assert run([*arguments, "--part", "video", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["engine"].endswith("h200-video")


def test_inspect_knows_the_engine_of_a_part(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    whole = family_bundle("video_llava", Precision.FP16, tmp_path_factory)
    folder = Path(shutil.copytree(whole.folder, tmp_path / "bundle"))
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        assert run(["compile", str(folder), "--target", "h200", "--no-timing-cache"]) == 0
    capsys.readouterr()
    assert run(["inspect", str(folder), "--json"]) == 0
    engines = {Path(item["engine"]).name: item for item in json.loads(capsys.readouterr().out)["engines"]}
    assert {name: (item["part"], item["fault"]) for name, item in engines.items()} == {
        "h200": ("image", None),
        "h200-video": ("video", None),
    }
    assert run(["inspect", str(folder)]) == 0
    assert "videos" in capsys.readouterr().out
