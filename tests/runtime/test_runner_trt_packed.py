"""The TensorRT runner over packed graphs, against stand-ins: pictures and clips of unequal size, part after part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_standin
from engine_bundles import family_bundle
from PIL import Image
from runtime.engines import H200
from tensorrt_standin import VERSIONS

from holov_export.bundle import Bundle, open_bundle
from holov_export.cli import run
from holov_export.compile.compilation import CompileOptions
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.engine import RECORD
from holov_export.errors import BudgetError, EngineError, EnvironmentFaultError, ImageError
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.preprocess_video import pixels_from_videos
from holov_export.runtime.runner import joined
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.runtime.runner_trt import TrtRunner
from holov_export.runtime.session import Session
from holov_export.spec import Precision
from holov_export.targets import target_from_name
from holov_export.tensors import PixelBatch, VisualTokens

FAMILIES = ("llava_next", "qwen2_5_vl", "video_llava")
PROFILES = ("batch=1:1:2,budget=1:9:all",)
VERSION = "10.3.0"  # for what does not differ between versions


@pytest.fixture(scope="module")
def pictures(photographs: list[Image.Image]) -> list[Image.Image]:
    """Of unequal aspect ratios and sizes."""
    astronaut, coffee, chelsea, rocket = photographs
    return [astronaut, coffee, chelsea.crop((100, 0, 200, 300)), rocket.resize((120, 80))]


def clips_of(pictures: list[Image.Image], frames: int = 8) -> list[np.ndarray[Any, Any]]:
    """Two clips of equal size that move differently."""
    return [
        np.stack([np.asarray(picture.rotate(4 * step).resize((96, 72))) for step in range(frames)])
        for picture in pictures[:2]
    ]


def compiled(source: Bundle, folder: Path, version: str, **options: Any) -> Bundle:
    """A copy of the bundle with engines for the H200 of the packed graph; a view of that graph."""
    shutil.copytree(source.folder, folder)
    part = "video" if source.manifest.plan.model.family == "video_llava" else "image"
    bundle = open_bundle(folder, verify="size").of_part(part)
    asked = CompileOptions(**{"profiles": PROFILES, "use_timing_cache": False, "layer_report": False, **options})
    with tensorrt_standin.installed(version, gpu=H200):
        engine_from_bundle(bundle, target_from_name("h200"), asked)
    return bundle


def pixels_for(bundle: Bundle, pictures: list[Image.Image]) -> PixelBatch:
    model = bundle.manifest.plan.model
    if bundle.part == "video":
        return pixels_from_videos(clips_of(pictures), model)
    return pixels_from_pictures(pictures, model)


def same(got: VisualTokens, wanted: VisualTokens) -> None:
    """Equal to the bit and in type."""
    for name in ("tokens", "positions", "counts", "saliency"):
        mine, theirs = getattr(got, name), getattr(wanted, name)
        assert mine.dtype == theirs.dtype, name
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_of_onnx_runtime(
    family: str,
    version: str,
    pictures: list[Image.Image],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Three times each, so that plain runs, the runs before a capture and replayed CUDA graphs are all compared."""
    bundle = compiled(family_bundle(family, Precision.FP16, tmp_path_factory), tmp_path / "bundle", version)
    pixels = pixels_for(bundle, pictures)
    tokens = [layout.tokens for layout in pixels.layouts]
    assert bundle.part == "video" or len(set(tokens)) > 1
    quota = [max(1, count // (3 + index)) for index, count in enumerate(tokens)]
    cases = [(max(quota), quota, spread) for spread in ("frames", "clip")] + [(max(tokens), None, "clip")]
    with OrtRunner(bundle, provider="cpu", threads=1, saliency=True) as ort:
        halves = [slice(at, at + 2) for at in range(0, len(pixels), 2)]  # as the profile holds them
        wanted = [
            joined(
                [
                    ort.run(pixels.part(few.start, few.stop), budget, quotas and quotas[few], spread=spread)
                    for few in halves
                ]
            )
            for budget, quotas, spread in cases
        ]
    with tensorrt_standin.installed(version, gpu=H200):
        world = tensorrt_standin.current()
        with TrtRunner(bundle, saliency=True) as runner:
            for _ in range(3):
                for (budget, quotas, spread), expected in zip(cases, wanted, strict=True):
                    same(runner.run(pixels, budget, quotas, spread=spread), expected)
            assert world.cuda.streams.launches >= 2
            assert runner.last_times is not None and runner.last_times.host > 0
            assert runner.tokens == bundle.manifest.plan.tokens
            first = runner.run(pixels, 1, saliency=False)
            assert first.saliency is None
            assert first.counts.tolist() == [1] * len(pixels)
        assert world.leaked() == []
        assert world.cuda.memory.free_bytes == H200.memory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Pictures of up to 200 tokens, clips of up to 8 frames."""
    source = family_bundle("qwen2_5_vl", Precision.FP16, tmp_path_factory)
    return compiled(source, tmp_path_factory.mktemp("qwen") / "bundle", VERSION, max_tokens=200, clip_frames=8)


@pytest.fixture
def trt(qwen: Bundle) -> Iterator[Any]:
    with tensorrt_standin.installed(VERSION, gpu=H200):
        yield tensorrt_standin.current()


@pytest.fixture(scope="module")
def ort(qwen: Bundle) -> Iterator[OrtRunner]:
    with OrtRunner(qwen, provider="cpu", threads=1, saliency=True) as runner:
        yield runner


def mixed(bundle: Bundle, pictures: list[Image.Image]) -> PixelBatch:
    """A picture, a clip, a picture: no profile holds a large picture and a clip together."""
    from holov_export.runtime.preprocess_video import joined_batches

    model = bundle.manifest.plan.model
    clips = pixels_from_videos(clips_of(pictures)[:1], model)
    first, last = (pixels_from_pictures([pictures[index]], model) for index in (0, 2))
    return joined_batches(joined_batches(first, clips), last)


@pytest.mark.parametrize("spread", ["frames", "clip"])
def test_pictures_and_clips_of_one_batch_are_parted_where_no_profile_holds_both(
    trt: Any, qwen: Bundle, ort: OrtRunner, pictures: list[Image.Image], spread: Any
) -> None:
    pixels = mixed(qwen, pictures)
    assert [layout.kind for layout in pixels.layouts] == ["image", "video", "image"]
    quota = [20, 13, 5]
    with TrtRunner(qwen, saliency=True) as runner:
        found = runner.run(pixels, 20, quota, spread=spread)
    same(found, joined([ort.run(pixels.part(at, at + 1), 20, [quota[at]], spread=spread) for at in range(3)]))
    assert found.counts.tolist() == quota


def test_a_graph_is_kept_for_the_lengths_of_all_axes(
    trt: Any, qwen: Bundle, ort: OrtRunner, pictures: list[Image.Image]
) -> None:
    """Two pictures with as many tokens but other windows must not share a CUDA graph."""
    wide, tall = (Image.new("RGB", size, "grey") for size in ((14 * 28, 3 * 28), (6 * 28, 7 * 28)))
    wide.paste(pictures[0].resize((80, 80)))
    tall.paste(pictures[1].resize((80, 80)))
    first, second = (pixels_from_pictures([image], qwen.manifest.plan.model) for image in (wide, tall))
    assert first.layouts[0].tokens == second.layouts[0].tokens == 42
    assert len(first.layouts[0].windows) != len(second.layouts[0].windows)
    with TrtRunner(qwen, saliency=True) as runner:
        for pixels in (first, first, second, first, second, second):
            same(runner.run(pixels, 9), ort.run(pixels, 9))
    assert trt.cuda.streams.launches == 2


def test_no_graphs_when_none_are_wanted(trt: Any, qwen: Bundle, pictures: list[Image.Image]) -> None:
    pixels = pixels_from_pictures(pictures[:1], qwen.manifest.plan.model)
    with TrtRunner(qwen, cuda_graphs=False) as runner:
        for _ in range(3):
            runner.run(pixels, 9)
    assert trt.cuda.streams.launches == 0


# ------------------------------------------------------------------------------------------------------ refusals


def test_larger_pictures_are_refused_with_the_way_out(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]
) -> None:
    source = family_bundle("qwen2_5_vl", Precision.FP16, tmp_path_factory)
    bundle = compiled(source, tmp_path / "bundle", VERSION, max_tokens=60)
    pixels = pixels_from_pictures([pictures[2], pictures[1]], bundle.manifest.plan.model)
    small, large = (layout.tokens for layout in pixels.layouts)
    assert small <= 60 < large
    clip = pixels_from_videos([clips_of(pictures)[0]], bundle.manifest.plan.model)
    assert clip.layouts[0].tokens <= 60
    with tensorrt_standin.installed(VERSION, gpu=H200), TrtRunner(bundle) as runner:
        assert runner.run(pixels.part(0, 1), 9).counts.tolist() == [9]
        with pytest.raises(EngineError, match=rf"image 2 has {large} tokens, .*'h200' takes at most 60") as bad:
            runner.run(pixels, 9)
        assert f"--max-tokens {large}" in bad.value.hint
        with pytest.raises(EngineError, match=r"no profile for clip 1, 4 rows at budget 3, patches .*: batch 1") as bad:
            runner.run(clip, 9)
        assert "--clip-frames" in bad.value.hint
        assert runner.run(pixels.part(0, 1), 9).counts.tolist() == [9]  # nothing is broken by that


def test_wrong_use(trt: Any, qwen: Bundle, pictures: list[Image.Image]) -> None:
    model = qwen.manifest.plan.model
    pixels = pixels_from_pictures(pictures[:2], model)
    with TrtRunner(qwen) as runner:
        with pytest.raises(EngineError, match="cannot stay on the device"):
            runner.run_on_device(pixels, 9)
        with pytest.raises(ImageError, match="unequal pictures"):
            runner.run(_OnDevice(), 9)
        with pytest.raises(ImageError, match="without layouts"):
            runner.run(PixelBatch(pixels.pixel_values, pixels.boxes, pixels.sizes), 9)
        with pytest.raises(ImageError, match="there is no image"):
            runner.run(pixels.part(0, 0), 9)
        with pytest.raises(BudgetError, match="quota of image 2"):
            runner.run(pixels, 9, [9, 10])
        with pytest.raises(BudgetError, match=r"in 1\.\.288"):
            runner.run(pixels, 289)
    with pytest.raises(EnvironmentFaultError, match="closed"):
        runner.run(pixels, 9)


class _OnDevice:
    """What says that it is on the GPU."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (4, 1176), "typestr": "<f2", "data": (0, False), "version": 3}


def test_a_record_with_other_axes_is_refused(trt: Any, qwen: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen.folder, tmp_path / "bundle"))
    path = folder / "engines" / "h200" / RECORD
    record = json.loads(path.read_text(encoding="utf-8"))
    axis = record["profiles"][0]["axes"][0]
    assert axis["name"] == "patches"
    axis["span"][2] += 4
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(EngineError, match="and other axes"):
        TrtRunner(open_bundle(folder, verify="size"))


def test_a_clip_needs_the_engine_that_sees_clips(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]
) -> None:
    source = family_bundle("video_llava", Precision.FP16, tmp_path_factory)
    folder = Path(shutil.copytree(source.folder, tmp_path / "bundle"))
    bundle = open_bundle(folder, verify="size")
    with tensorrt_standin.installed(VERSION, gpu=H200):
        engine_from_bundle(bundle, target_from_name("h200"), CompileOptions(use_timing_cache=False))
        with Session.open(bundle, engine="tensorrt", decoder="none") as session:
            assert session.see(pictures[:1], budget=4).counts.tolist() == [4]
            with pytest.raises(EngineError, match="has no engine that sees clips"):
                session.see(videos=clips_of(pictures)[:1], budget=8)
        engine_from_bundle(bundle.of_part("video"), target_from_name("h200"), CompileOptions(use_timing_cache=False))
        with Session.open(bundle, engine="tensorrt", decoder="none") as session:
            seen = session.see(videos=clips_of(pictures)[:1], budget=16)
    with Session.open(bundle, provider="cpu", threads=1, decoder="none") as session:
        same(seen, session.see(videos=clips_of(pictures)[:1], budget=16))


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "family",
    ["video_llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next", "qwen2_5_vl"))],
)
def test_ask_answers_as_onnx_runtime_does(
    family: str, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way by the command line: export with a decoder, compile, ask with either engine."""
    from family_checkpoints import write_family

    checkpoint = write_family(tmp_path / "checkpoint", family)
    folder, photo = tmp_path / "bundle", tmp_path / "photo.png"
    pictures[1].save(photo)
    assert run(["--model", str(checkpoint), "-o", str(folder), "--no-verify"]) == 0
    question = ["ask", str(folder), str(photo), "what is this?", "--budget", "20"]
    if family == "video_llava":
        frames = tmp_path / "frames"
        frames.mkdir()
        for index, frame in enumerate(clips_of(pictures)[0]):
            Image.fromarray(frame).save(frames / f"{index}.png")
        question = ["ask", str(folder), "--video", str(frames), "what is this?", "--budget", "20"]
    said = ["--max-new-tokens", "8", "--threads", "1", "--provider", "cpu", "--json"]
    capsys.readouterr()
    assert run([*question, *said]) == 0
    wanted = json.loads(capsys.readouterr().out)
    with tensorrt_standin.installed("11.4.0", gpu=H200):
        assert run(["compile", str(folder), "--target", "h200", "--no-timing-cache"]) == 0
        capsys.readouterr()
        assert run([*question, *said, "--engine", "tensorrt"]) == 0
        assert tensorrt_standin.current().leaked() == []
    found = json.loads(capsys.readouterr().out)
    assert len(found["token_ids"]) > 0
    assert found["token_ids"] == wanted["token_ids"]
