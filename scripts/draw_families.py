"""Draw docs/images/kept-tiles.png and kept-clip.png: what `holov` keeps of tiles, and of a clip.

    python scripts/draw_families.py docs/images

Needs the 'export', 'cpu' and 'dev' extras. No trained LLaVA-NeXT or Video-LLaVA is small enough to ship, so the demo
model's trained CLIP tower is put into random checkpoints of these families; nothing but the tower decides what stays.
Demo scenes stand side by side; the clip slides over them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from family_checkpoints import write_family

from holov_export.assets import data_folder
from holov_export.bundle import Bundle
from holov_export.pipeline import export_bundle
from holov_export.policies import policy_from_settings
from holov_export.request import ExportRequest
from holov_export.runtime.runner import Runner
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.spec import Precision
from holov_export.verify.panels import panels_from_bundle, subject_from_clip, subject_from_picture
from holov_export.verify.picture import picture_of_panels

#: of the demo model's tower
SIZES = {
    "image_size": 84,
    "patch_size": 7,
    "vision_width": 128,
    "vision_layers": 6,
    "vision_heads": 4,
    "vision_mlp": 512,
}
SIDE, FRAMES, STEP = 84, 22, 8
TOWERS = ("vision_tower.", "image_tower.", "video_tower.")


def checkpoint_with_the_demo_tower(folder: Path, family: str) -> Path:
    """A random checkpoint of the family with the demo model's tower in it."""
    trained = load_file(data_folder("demo-model") / "model.safetensors")
    write_family(folder, family, **SIZES)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        for tower in TOWERS:
            _, found, tail = name.partition(tower)
            if found:
                source = trained[f"vision_tower.vision_model.{tail.removeprefix('vision_model.')}"]
                weights[name] = source.to(weights[name].dtype).reshape(weights[name].shape).clone()
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def bundle_of(checkpoint: Path, output: Path) -> Bundle:
    """Its vision graphs, without a decoder."""
    request = ExportRequest(
        model=str(checkpoint),
        policy=policy_from_settings("holov"),
        precision=Precision.FP32,
        decoder=None,
        output=output,
        verify=False,
    )
    return export_bundle(request)[0]


def side_by_side(*numbers: int) -> Image.Image:
    """Demo scenes in a row."""
    row = Image.new("RGB", (SIDE * len(numbers), SIDE))
    for place, number in enumerate(numbers):
        with Image.open(data_folder("demo-scenes") / f"scene_{number}.png") as scene:
            row.paste(scene.convert("RGB"), (SIDE * place, 0))
    return row


def main(output: Path) -> None:
    """Write both pictures."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        draw_tiles(folder, output / "kept-tiles.png")
        draw_clip(folder, output / "kept-clip.png")


def draw_tiles(folder: Path, output: Path) -> None:
    """A wide picture: the whole of it, and its tiles."""
    picture = folder / "wide.png"
    side_by_side(1, 0).save(picture)
    bundle = bundle_of(checkpoint_with_the_demo_tower(folder / "next", "llava_next"), folder / "next-bundle")
    subject = subject_from_picture(picture, bundle.manifest.plan.model, 480)
    panels = panels_from_bundle(bundle, runner_of, subject.pixels, 48, ["holov", "uniform"], "frames")
    picture_of_panels(subject, panels).save(output, optimize=True)


def draw_clip(folder: Path, output: Path) -> None:
    """A clip, with one quota for all frames."""
    frames, row = folder / "slide", side_by_side(1, 0, 2)
    frames.mkdir()
    for number in range(FRAMES):
        row.crop((number * STEP, 0, number * STEP + SIDE, SIDE)).save(frames / f"{number}.png")
    bundle = bundle_of(checkpoint_with_the_demo_tower(folder / "video", "video_llava"), folder / "video-bundle")
    subject = subject_from_clip(frames, bundle.manifest.plan.model, 160)
    panels = panels_from_bundle(bundle.of_part("video"), runner_of, subject.pixels, 96, ["holov"], "clip")
    picture_of_panels(subject, panels).save(output, optimize=True)


def runner_of(bundle: Bundle) -> Runner:
    """ONNX Runtime on the CPU."""
    return runner_from_bundle(bundle, provider="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
