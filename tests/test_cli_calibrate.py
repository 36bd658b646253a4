"""`calibrate` on the command line: what it prints where, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from holov_export.bundle import CALIBRATION, Bundle, open_bundle, write_manifest
from holov_export.cli.calibrate import calibrate
from holov_export.errors import ImageError, IntegrityError, UnknownNameError, UsageError
from holov_export.quantize.cache import RECORD
from holov_export.spec import Quantization, QuantizedType

Said = Callable[..., tuple[str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run the command and return what it wrote to stdout and to stderr."""

    def run(*arguments: str | Path) -> tuple[str, str]:
        calibrate.main([str(item) for item in arguments], standalone_mode=False)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def bundle(toy_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle.folder, tmp_path / "bundle"))


@pytest.fixture
def folder(tmp_path: Path, photographs: list[Image.Image]) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    for index, image in enumerate(photographs):
        image.save(made / f"{index}.png")
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "few.toml"
    path.write_text(
        'name = "few"\ntitle = "two of a folder"\nsource = "folder"\n[folder]\ncount = 2\njudge = 1\n', encoding="utf-8"
    )
    return path


def test_a_recipe_that_ships_is_the_default(said: Said, bundle: Path) -> None:
    out, err = said(bundle)
    assert "smoke-8: minmax, 8 pictures at 7, 64 tokens" in out
    assert "channels are above 6 times the median channel of their activation, in 0 activations" in out
    assert str(bundle / CALIBRATION / "smoke-8") in out
    assert "holov: 8 pictures of 'smoke-8'" in err
    assert (bundle / CALIBRATION / "smoke-8" / RECORD).is_file()
    assert open_bundle(bundle).manifest


def test_json_says_the_same_for_programs(said: Said, bundle: Path, folder: Path, recipe: Path) -> None:
    out, _ = said(bundle, "--recipe", recipe, "--pictures", folder, "--json")
    (found,) = json.loads(out)
    assert found["graph"] == "holov"
    assert (found["recipe"], found["algorithm"], found["budgets"]) == ("few", "minmax", [7, 64])
    assert len(found["pictures"]) == 2
    assert (found["activations"], found["widest"]["activation"], found["widest"]["linear"]) == (1, "patches", "weights")
    assert found["widest"]["low"] < 0 < found["widest"]["high"]
    assert found["folder"] == str(bundle / CALIBRATION / "few")
    kept = json.loads((bundle / CALIBRATION / "few" / RECORD).read_text())
    assert kept["tensors"]["patches"]["low"] == found["widest"]["low"]


def test_ranges_are_used_again_until_asked_otherwise(said: Said, bundle: Path, folder: Path, recipe: Path) -> None:
    options = (bundle, "--recipe", recipe, "--pictures", folder)
    said(*options)
    path = bundle / CALIBRATION / "few" / RECORD
    kept = path.read_text().replace('"created": "2', '"created": "1')
    path.write_text(kept)
    said(*options)
    assert path.read_text() == kept
    said(*options, "--again")
    assert path.read_text() != kept
    path.write_text(kept[:-30])
    with pytest.raises(IntegrityError, match="are damaged") as caught:
        said(*options)
    assert "--again" in caught.value.hint
    said(*options, "--again")


def test_other_pictures_in_the_folder_are_told(said: Said, bundle: Path, folder: Path, recipe: Path) -> None:
    options = (bundle, "--recipe", recipe, "--pictures", folder)
    said(*options)
    for path in sorted(folder.iterdir())[1:]:
        Image.open(path).rotate(90, expand=True).save(path)
    assert "the ranges in calibration/few are of other pictures" in said(*options)[1]


@pytest.mark.slow
def test_every_graph_is_calibrated_or_one(said: Said, llava_checkpoint: Path, tmp_path: Path) -> None:
    from holov_export.cli import run

    out = tmp_path / "two"
    assert run(["--model", str(llava_checkpoint), "-o", str(out), "--method", "holov,cls-topk", "--no-verify"]) == 0
    text, _ = said(out, "--method", "cls-topk")
    assert [path.name for path in (out / CALIBRATION).iterdir()] == ["smoke-8-cls-topk"]
    assert text.count("smoke-8: minmax") == 1
    text, _ = said(out)
    assert sorted(path.name for path in (out / CALIBRATION).iterdir()) == ["smoke-8", "smoke-8-cls-topk"]
    assert text.count("smoke-8: minmax") == 2


class TestRefusals:
    def test_a_quantised_bundle(self, said: Said, bundle: Path) -> None:
        manifest = open_bundle(bundle).manifest
        plan = manifest.plan.model_copy(update={"quantization": Quantization(type=QuantizedType.INT8)})
        write_manifest(bundle, manifest.model_copy(update={"plan": plan}))
        with pytest.raises(UsageError, match="'bundle' is quantised already"):
            said(bundle)

    def test_a_recipe_that_does_not_exist(self, said: Said, bundle: Path) -> None:
        with pytest.raises(UnknownNameError, match="nonsuch"):
            said(bundle, "--recipe", "nonsuch")

    def test_a_graph_that_does_not_exist(self, said: Said, bundle: Path) -> None:
        with pytest.raises(UnknownNameError, match="no graph for 'scope'"):
            said(bundle, "--method", "scope")

    def test_pictures_that_say_nothing(self, said: Said, bundle: Path, recipe: Path, tmp_path: Path) -> None:
        grey = tmp_path / "grey"
        grey.mkdir()
        for value in (10, 20, 30):
            Image.new("RGB", (40, 30), (value,) * 3).save(grey / f"{value}.png")
        with pytest.raises(ImageError):
            said(bundle, "--recipe", recipe, "--pictures", grey)
        assert not (bundle / CALIBRATION).exists()
