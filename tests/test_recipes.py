"""Calibration recipes: the files that ship, what a user's own is told, and which pictures are refused."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from holov_export.errors import (
    HolovExportError,
    ImageError,
    IntegrityError,
    MissingExtraError,
    StorageError,
    UnknownNameError,
    UsageError,
)
from holov_export.policies import Frozen
from holov_export.recipe_pictures import LOCK, lock_from_hashes, locked_hashes
from holov_export.recipes import (
    FolderPictures,
    Limits,
    PackageFacts,
    PictureFile,
    Recipe,
    RecipePictures,
    list_recipes,
    pictures_of,
    recipe_from_name,
    recipe_names,
    recipe_schema_text,
    recipe_sha256,
)

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "calibration"
RECIPES = list_recipes()
#: sha256 of two pictures of smoke-8
ASTRONAUT = "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"
CHELSEA = "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"
NAMED = [recipe for recipe in RECIPES if recipe.source != "folder"]


def drawn(path: Path, seed: int, size: tuple[int, int] = (12, 9), **options: Any) -> Path:
    """A picture of noise; seeds give different ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_recipe(count: int = 3, judge: int = 2, seed: int = 0) -> Recipe:
    wanted = FolderPictures(count=count, judge=judge)
    return Recipe(name="mine", title="x", source="folder", folder=wanted, seed=seed)


def files_recipe(calibrate: list[str], judge: list[str], **hashes: str) -> Recipe:
    """Named files; `hashes` by the name without its ending."""

    def files(names: list[str]) -> tuple[PictureFile, ...]:
        return tuple(PictureFile(file=name, sha256=hashes.get(name.split(".")[0])) for name in names)

    return Recipe(name="mine", title="x", source="files", licence="CC0", calibrate=files(calibrate), judge=files(judge))


def names(pictures: RecipePictures) -> tuple[list[str], list[str]]:
    return [item.name for item in pictures.calibrate], [item.name for item in pictures.judge]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures, two of them nested."""
    for index in range(6):
        drawn(tmp_path / "pictures" / f"{index}.png", index)
    drawn(tmp_path / "pictures" / "deep" / "er" / "6.JPG", 6)
    drawn(tmp_path / "pictures" / "deep" / "7.webp", 7)
    return tmp_path / "pictures"


class TestShipped:
    def test_all_of_them_are_there(self) -> None:
        assert recipe_names() == ("coco-512", "folder", "smoke-8") == tuple(recipe.name for recipe in RECIPES)

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
    def test_a_file_is_called_like_its_recipe_and_names_its_schema(self, recipe: Recipe) -> None:
        text = (CALIBRATION / f"{recipe.name}.toml").read_text(encoding="utf-8")
        assert text.startswith("#:schema ./recipe.schema.json\n")
        assert f'\nname = "{recipe.name}"\n' in text
        assert recipe_from_name(recipe.name) == recipe

    def test_the_schema_is_up_to_date(self) -> None:
        assert (CALIBRATION / "recipe.schema.json").read_text(encoding="utf-8") == recipe_schema_text()

    @pytest.mark.parametrize("recipe", NAMED, ids=lambda recipe: recipe.name)
    def test_recipes_with_pictures_say_where_facts_come_from(self, recipe: Recipe) -> None:
        assert recipe.sources
        if recipe.source == "packages":
            assert all(item.licence and item.credit for item in (*recipe.calibrate, *recipe.judge))
            assert {item.module for item in recipe.packages} == {
                item.package for item in (*recipe.calibrate, *recipe.judge)
            }
            assert all(re.fullmatch(r"\d+\.\d+\.\d+ to \d+\.\d+\.\d+", item.versions) for item in recipe.packages)

    def test_smoke_8_is_what_its_name_says(self) -> None:
        found = pictures_of(recipe_from_name("smoke-8"), None)
        assert len(found.calibrate) == 8
        assert len(found.judge) >= 5
        for picture in (*found.calibrate, *found.judge):
            image = picture.image()
            assert image.mode == "RGB"
            assert min(image.size) >= 300
            assert float(np.asarray(image).std()) > 10  # photographs, not drawings on one ground
        assert found.calibrate[0].name == "skimage/data/astronaut.png"

    def test_coco_512_is_what_its_name_says(self) -> None:
        recipe = recipe_from_name("coco-512")
        assert (len(recipe.calibrate), len(recipe.judge)) == (512, 64)
        assert all(re.fullmatch(r"\d{12}\.jpg", item.file) for item in (*recipe.calibrate, *recipe.judge))
        assert recipe.fetch == "http://images.cocodataset.org/train2017/"
        # pictures of POPE, of VQAv2's validation set (the first of val2014), of MLPerf's list
        known = {"000000310196.jpg", "000000000042.jpg", "000000391895.jpg", "000000522418.jpg", "000000000139.jpg"}
        assert not known & {item.file for item in (*recipe.calibrate, *recipe.judge)}


class TestReading:
    def test_a_file_of_ones_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = (CALIBRATION / "folder.toml").read_text(encoding="utf-8")
        (tmp_path / "mine.toml").write_text(text.replace('"folder"\ntitle', '"mine"\ntitle'), encoding="utf-8")
        assert recipe_from_name(str(tmp_path / "mine.toml")).name == "mine"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert recipe_from_name("./mine.toml") == recipe_from_name("~/mine.toml")

    def test_an_unknown_name_names_close_ones(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown recipe 'coco'") as caught:
            recipe_from_name("coco")
        assert caught.value.hint.startswith("Did you mean: coco-512? There are coco-512, folder, smoke-8; ")
        with pytest.raises(UnknownNameError) as caught:
            recipe_from_name("s")
        assert caught.value.hint.startswith("Did you mean: smoke-8? ")
        with pytest.raises(UnknownNameError, match="unknown recipe 'zzz'") as caught:
            recipe_from_name("zzz")
        assert caught.value.hint.startswith("There are")

    def test_a_file_that_is_not_there_is_a_folder_or_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match=r"there is no recipe file '.*gone\.toml'"):
            recipe_from_name(str(tmp_path / "gone.toml"))
        (tmp_path / "x.toml").mkdir()
        with pytest.raises(UsageError, match="is a folder, not a recipe file"):
            recipe_from_name(str(tmp_path / "x.toml"))
        (tmp_path / "y.toml").write_bytes(b'name = "\xff"')
        with pytest.raises(UsageError, match="is not UTF-8 text"):
            recipe_from_name(str(tmp_path / "y.toml"))
        (tmp_path / "z.toml").write_text('name = "z"\ntitle = \n', encoding="utf-8")
        with pytest.raises(UsageError, match=r"z.toml' is not TOML: .*line 2"):
            recipe_from_name(str(tmp_path / "z.toml"))

    @pytest.mark.parametrize(
        ("shipped", "change", "to", "said"),
        [
            ("folder", "seed = 0", 'seed = 0\ncolour = "red"', r"colour \(line 8\): unknown key"),
            ("folder", 'title = "pictures of your own', 'titel = "pictures of your own', "title: missing"),
            ("folder", 'algorithm = "minmax"', 'algorithm = "best"', r"algorithm \(line \d+\): Input should be "),
            ("folder", "seed = 0", "seed = 0\npercentile = 100", r"percentile \(line 8\): .*less than 100"),
            ("folder", "seed = 0", "seed = 0\npercentile = nan", r"percentile \(line 8\)"),
            ("folder", "seed = 0", "seed = 0\nsmoothing = 1.0", r"smoothing \(line 8\): .*less than 1"),
            ("folder", '["1/9", "all"]', '["1/9", "many"]', r'budgets\.2 \(line \d+\): .*a share such as "1/9"'),
            ("folder", '["1/9", "all"]', "[true]", r"budgets\.1 \(line \d+\): a budget is a positive number"),
            ("folder", '["1/9", "all"]', "[]", r"budgets \(line \d+\): .*at least 1 item"),
            ("folder", '["1/9", "all"]', '["all", "all"]', "budgets names one twice"),
            ("folder", "count = 64", "count = 0", r"folder\.count \(line \d+\): .*greater than or equal to 1"),
            ("folder", "count = 64", "count = 10000000", r"folder\.count \(line \d+\): .*less than or equal to"),
            ("folder", "overlap = 0.97", "overlap = 97", r"limits\.overlap \(line \d+\): .*less than or equal to 1"),
            ("folder", 'source = "folder"', 'source = "files"', r'a \[folder\] table belongs to the source "folder"'),
            ("folder", "seed = 0", 'fetch = "https://example.org/"', 'fetch belongs to the source "files"'),
            ("folder", 'name = "folder"', 'name = "../x"', r"name \(line 2\): String should match pattern"),
            ("smoke-8", 'source = "packages"', 'source = "folder"', r'source "folder", which needs one'),
            ("smoke-8", 'source = "packages"', 'source = "folder"\nfolder = { count = 1 }', "names no pictures"),
            ("smoke-8", "88431cd9", "88431CD9", r"calibrate\.1\.sha256 \(line \d+\): String should match pattern"),
            ("smoke-8", "data/coffee.png", "../coffee.png", r"calibrate\.2\.file \(line \d+\): .*without '\.\.'"),
            ("smoke-8", "data/coffee.png", "/data/coffee.png", r"calibrate\.2\.file \(line \d+\)"),
            ("smoke-8", "data/coffee.png", "data/astronaut.png", "skimage/data/astronaut.png is there twice"),
            ("smoke-8", CHELSEA, ASTRONAUT, "the sha256 88431cd9.* is there twice"),
            ("smoke-8", 'licence = "CC0"\n', "", "skimage/data/coffee.png: neither it nor the recipe names a licence"),
            ("smoke-8", 'package = "skimage"\n', "", 'astronaut.png: package belongs to the source "packages"'),
            ("smoke-8", 'package = "skimage"', 'package = "skimage.data"', r"calibrate\.1\.package \(line \d+\)"),
            ("smoke-8", 'module = "skimage"', 'module = "scipy"', "packages names scipy, which no picture is from"),
            ("smoke-8", f'sha256 = "{ASTRONAUT}"\n', "", "skimage/data/astronaut.png: sha256 is missing"),
            ("coco-512", "http://images", "ftp://images", r"fetch \(line \d+\): String should match pattern"),
            ("coco-512", "judge = [", "ignore = [", r"ignore \(line \d+\): unknown key"),
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_named_with_key_and_line(
        self, tmp_path: Path, shipped: str, change: str, to: str, said: str
    ) -> None:
        text = (CALIBRATION / f"{shipped}.toml").read_text(encoding="utf-8")
        assert change in text
        path = tmp_path / "mine.toml"
        path.write_text(text.replace(change, to, 1), encoding="utf-8")
        with pytest.raises(UsageError, match=said) as caught:
            recipe_from_name(str(path))
        assert "mine.toml' is no usable recipe" in caught.value.message
        for line in re.findall(r"\(line (\d+)\)", caught.value.message):
            assert to.splitlines()[-1] in path.read_text(encoding="utf-8").splitlines()[int(line) - 1]

    def test_pictures_to_judge_by_are_needed(self) -> None:
        one = PictureFile(file="a.png", licence="CC0")
        for calibrate, judge in (((one,), ()), ((), (one,)), ((), ())):
            with pytest.raises(ValueError, match="others to judge by"):
                Recipe(name="x", title="x", source="files", calibrate=calibrate, judge=judge)

    def test_the_hash_is_of_what_a_recipe_says_and_not_of_its_file(self, tmp_path: Path) -> None:
        text = (CALIBRATION / "folder.toml").read_text(encoding="utf-8")
        path = tmp_path / "x.toml"
        path.write_text("# a remark\n" + text.replace("\n", "\r\n"), encoding="utf-8")
        first = recipe_sha256(recipe_from_name("folder"))
        assert recipe_sha256(recipe_from_name(str(path))) == first
        assert re.fullmatch(r"[0-9a-f]{64}", first)
        changes = [("seed = 0", "seed = 1", False), ("0.97", "0.96", True), ("count = 64", "count = 63", False)]
        for change, to, same in changes:  # limits change no range
            assert change in text
            path.write_text(text.replace(change, to), encoding="utf-8")
            assert (recipe_sha256(recipe_from_name(str(path))) == first) is same

    def test_it_needs_nothing_but_the_core(self) -> None:
        """Pictures are found in packages that are never imported."""
        program = (
            "import json, sys; from holov_export.recipes import recipe_from_name, pictures_of; "
            "pictures_of(recipe_from_name('smoke-8'), None); "
            "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        heavy = {"skimage", "sklearn", "matplotlib", "scipy", "torch", "onnx", "onnxruntime", "transformers"}
        assert not heavy & set(json.loads(done.stdout))


class TestPackages:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An installed package that ships three pictures, and fails when it is imported."""
        folder = tmp_path / "site" / "shipped_pictures"
        for index, name in enumerate("abc"):
            drawn(folder / "data" / f"{name}.png", index)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return folder

    @staticmethod
    def recipe(package: Path, *modules: str, files: str = "abc", **hashes: str) -> Recipe:
        """The pictures `files`, the last of them to judge by; those of `modules` come first."""
        own = tuple(
            PictureFile(
                package=package.name,
                file=f"data/{name}.png",
                sha256=hashes.get(name) or sha256(package / "data" / f"{name}.png"),
            )
            for name in files
        )
        others = tuple(PictureFile(package=name, file="x.png", sha256=f"{i}" * 64) for i, name in enumerate(modules))
        facts = [PackageFacts(module=name, pip=f"pip-of-{name}", versions="1.0 to 1.4") for name in modules]
        if "facts" in hashes:
            facts.append(PackageFacts(module=package.name, pip="shipped-pictures", versions="1.0 to 1.4"))
        return Recipe(
            name="mine", title="x", source="packages", licence="CC0",
            calibrate=(*others, *own[:-1]), judge=own[-1:], packages=tuple(facts),
        )  # fmt: skip

    def test_pictures_are_found_without_an_import(self, package: Path) -> None:
        found = pictures_of(self.recipe(package), None)
        assert names(found) == (["shipped_pictures/data/a.png", "shipped_pictures/data/b.png"],
                                ["shipped_pictures/data/c.png"])  # fmt: skip
        assert found.calibrate[0].path == package / "data" / "a.png"
        assert found.calibrate[0].sha256 == sha256(package / "data" / "a.png")
        assert found.calibrate[0].image().size == (12, 9)

    def test_all_packages_that_are_not_installed_are_named_at_once(self, package: Path) -> None:
        with pytest.raises(MissingExtraError, match="not installed: nowhere_one, nowhere_two") as caught:
            pictures_of(self.recipe(package, "nowhere_one", "nowhere_two"), None)
        assert caught.value.hint == "Run: pip install pip-of-nowhere_one pip-of-nowhere_two"

    def test_a_module_that_is_no_package_ships_nothing(self, package: Path) -> None:
        (package.parent / "lone_module.py").write_text("", encoding="utf-8")
        with pytest.raises(MissingExtraError, match="not installed: lone_module"):
            pictures_of(self.recipe(package, "lone_module"), None)

    def test_a_missing_picture_is_named_with_the_versions_that_have_it(self, package: Path) -> None:
        recipe = self.recipe(package, facts="yes")
        (package / "data" / "b.png").unlink()
        with pytest.raises(MissingExtraError, match=r"lacks shipped_pictures/data/b\.png: ") as caught:
            pictures_of(recipe, None)
        assert caught.value.hint == "The recipe holds for shipped-pictures 1.0 to 1.4."

    def test_a_changed_picture_is_named_with_both_hashes(self, package: Path) -> None:
        recipe = self.recipe(package, a="ab" * 32, facts="yes")
        with pytest.raises(IntegrityError, match=r"data/a\.png has sha256 ") as caught:
            pictures_of(recipe, None)
        assert f"{sha256(package / 'data' / 'a.png')[:12]}..." in caught.value.message
        assert "the recipe means abababababab..." in caught.value.message
        assert "b.png" not in caught.value.message
        assert caught.value.hint == "The recipe holds for shipped-pictures 1.0 to 1.4."

    def test_a_folder_is_not_looked_at(self, package: Path, folder: Path) -> None:
        with pytest.raises(UsageError, match="from installed packages, not from a folder"):
            pictures_of(self.recipe(package), folder)

    def test_the_shipped_recipe_notices_another_file(self, tmp_path: Path) -> None:
        text = (CALIBRATION / "smoke-8.toml").read_text(encoding="utf-8")
        (tmp_path / "x.toml").write_text(text.replace("cc02f8ca188b", "000000000000"), encoding="utf-8")
        with pytest.raises(IntegrityError, match=r"coffee\.png has sha256 cc02f8ca188b.*means 000000000000") as caught:
            pictures_of(recipe_from_name(str(tmp_path / "x.toml")), None)
        assert "scikit-image 0.22.0 to 0.26.0" in caught.value.hint


class TestFolder:
    def test_the_seed_and_the_names_decide(self, folder: Path, tmp_path: Path) -> None:
        first = pictures_of(folder_recipe(), folder)
        calibrate, judge = names(first)
        assert (len(calibrate), len(judge)) == (3, 2)
        assert not set(calibrate) & set(judge)
        assert names(pictures_of(folder_recipe(), folder)) == (calibrate, judge)
        folder.rename(tmp_path / "moved")
        assert names(pictures_of(folder_recipe(), tmp_path / "moved")) == (calibrate, judge)
        others = {str(names(pictures_of(folder_recipe(seed=seed), tmp_path / "moved"))) for seed in range(1, 6)}
        assert others - {str((calibrate, judge))}

    def test_nested_pictures_count_and_hidden_ones_do_not(self, folder: Path) -> None:
        drawn(folder / ".thumbnails" / "8.png", 8)
        drawn(folder / ".9.png", 9)
        (folder / "notes.txt").write_text("not a picture", encoding="utf-8")
        (folder / "fake.png.part").write_bytes(b"half")
        calibrate, judge = names(pictures_of(folder_recipe(6, 2), folder))
        assert sorted(calibrate + judge) == [*(f"{index}.png" for index in range(6)), "deep/7.webp", "deep/er/6.JPG"]

    def test_of_copies_one_counts(self, folder: Path) -> None:
        for index in range(6):
            (folder / f"copy{index}.png").write_bytes((folder / f"{index}.png").read_bytes())
        found = pictures_of(folder_recipe(6, 2), folder)
        assert len({item.sha256 for item in (*found.calibrate, *found.judge)}) == 8
        with pytest.raises(
            UsageError, match=r"has 8 pictures \(6 more are copies\), and .* needs 9: 7 for .* 2 others"
        ):
            pictures_of(folder_recipe(7, 2), folder)

    def test_a_picture_that_is_added_moves_few_others(self, folder: Path) -> None:
        before = names(pictures_of(folder_recipe(4, 3), folder))
        drawn(folder / "new.png", 50)
        after = names(pictures_of(folder_recipe(4, 3), folder))
        assert len(set(before[0]) & set(after[0])) >= 3

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda path: None, "there is no folder"),
            (lambda path: path.write_text("x"), "is a file, not a folder"),
            (
                lambda path: path.mkdir(),
                r"has no pictures, and the recipe 'mine' needs 5: 3 for the ranges and 2 others",
            ),
            (lambda path: drawn(path / "a.png", 1), "has 1 picture, and the recipe 'mine' needs 5"),
        ],
    )
    def test_a_folder_that_will_not_do(self, tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
        make(tmp_path / "folder")
        with pytest.raises(UsageError, match=said):
            pictures_of(folder_recipe(), tmp_path / "folder")

    def test_no_folder(self) -> None:
        with pytest.raises(UsageError, match="takes its pictures from a folder of yours") as caught:
            pictures_of(folder_recipe(), None)
        assert caught.value.hint == "Name it: --pictures DIR"

    def test_a_picture_that_cannot_be_decoded_is_named(self, folder: Path) -> None:
        path = folder / "3.png"
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ImageError, match=r"'mine' cannot use a picture: '.*3\.png' cannot be decoded"):
            pictures_of(folder_recipe(6, 2), folder)
        path.write_text("no picture at all", encoding="utf-8")
        with pytest.raises(ImageError, match=r"3\.png' is not an image"):
            pictures_of(folder_recipe(6, 2), folder)

    @pytest.mark.parametrize("colour", [(128, 128, 128), (0, 0, 0), (200, 30, 30)])
    def test_a_single_colour_is_refused(self, folder: Path, colour: tuple[int, int, int]) -> None:
        Image.new("RGB", (40, 30), colour).save(folder / "2.png")
        with pytest.raises(ImageError, match=r"'2\.png' is a single colour, and ranges from it are worthless"):
            pictures_of(folder_recipe(6, 2), folder)

    def test_what_is_seen_through_counts_as_white(self, folder: Path) -> None:
        """A picture whose pixels differ only where nobody sees them."""
        levels = np.zeros((9, 12, 4), dtype=np.uint8)
        levels[..., 0] = np.arange(12)
        Image.fromarray(levels).save(folder / "2.png")
        with pytest.raises(ImageError, match="single colour"):
            pictures_of(folder_recipe(6, 2), folder)

    def test_grey_and_red_photographs_are_no_single_colour(self, folder: Path) -> None:
        with Image.open(folder / "2.png") as image:
            image.convert("L").save(folder / "2.png")
        with Image.open(folder / "3.png") as image:
            levels = np.asarray(image) * np.uint8([1, 0, 0])
        Image.fromarray(levels).save(folder / "3.png")
        assert len(pictures_of(folder_recipe(6, 2), folder).calibrate) == 6

    def test_a_picture_is_upright(self, tmp_path: Path) -> None:
        for index in range(2):
            exif = Image.Exif()
            exif[0x0112] = 6  # turn by 90 degrees
            drawn(tmp_path / f"{index}.jpg", index, (40, 20), exif=exif)
        found = pictures_of(folder_recipe(1, 1), tmp_path)
        assert found.calibrate[0].image().size == (20, 40)

    def test_a_picture_that_changes_later_is_noticed(self, folder: Path) -> None:
        picture = pictures_of(folder_recipe(), folder).calibrate[0]
        drawn(folder / picture.name, 99)
        with pytest.raises(IntegrityError, match=f"'{picture.name}' was changed"):
            picture.image()
        picture.path.unlink()
        with pytest.raises(StorageError, match="cannot read"):
            picture.image()


class TestFiles:
    def lock(self, folder: Path, *files: str) -> None:
        hashes = [(name, sha256(folder / name)) for name in files]
        (folder / LOCK).write_text(lock_from_hashes(hashes), encoding="utf-8")

    def test_the_lock_says_what_the_recipe_does_not(self, folder: Path) -> None:
        self.lock(folder, "0.png", "1.png", "2.png", "deep/7.webp")
        found = pictures_of(files_recipe(["1.png", "deep/7.webp"], ["0.png"]), folder)
        assert names(found) == (["1.png", "deep/7.webp"], ["0.png"])
        drawn(folder / "1.png", 77)
        with pytest.raises(IntegrityError, match=r"1\.png has sha256") as caught:
            pictures_of(files_recipe(["1.png", "deep/7.webp"], ["0.png"]), folder)
        assert "fetch it again" in caught.value.hint

    def test_the_recipe_outranks_the_lock(self, folder: Path) -> None:
        true = {"x0": sha256(folder / "0.png"), "x1": sha256(folder / "1.png")}
        for name in ("0", "1"):
            (folder / f"{name}.png").rename(folder / f"x{name}.png")
        assert len(pictures_of(files_recipe(["x0.png"], ["x1.png"], **true), folder).judge) == 1
        drawn(folder / "x0.png", 77)
        self.lock(folder, "x0.png", "x1.png")
        with pytest.raises(IntegrityError, match=r"x0\.png"):
            pictures_of(files_recipe(["x0.png"], ["x1.png"], **true), folder)

    def test_neither_hash_nor_lock(self, folder: Path) -> None:
        with pytest.raises(UsageError, match=r"sha256\.txt' is missing, .* of 0\.png, 1\.png") as caught:
            pictures_of(files_recipe(["0.png"], ["1.png"]), folder)
        assert f"scripts/fetch_calibration mine {folder}" in caught.value.hint
        self.lock(folder, "0.png")
        with pytest.raises(UsageError, match=r"sha256\.txt' does not name 1\.png"):
            pictures_of(files_recipe(["0.png"], ["1.png"]), folder)

    def test_missing_files_are_named(self, folder: Path) -> None:
        gone = [f"gone{index}.png" for index in range(7)]
        with pytest.raises(ImageError, match=r"lacks gone0\.png, .*gone3\.png and 3 more, of 8 in the recipe 'mine'"):
            pictures_of(files_recipe(["0.png", *gone[:4]], gone[4:]), folder)
        with pytest.raises(UsageError, match="there is no folder"):
            pictures_of(files_recipe(["0.png"], ["1.png"]), folder / "nowhere")
        with pytest.raises(UsageError, match="from a folder of yours"):
            pictures_of(files_recipe(["0.png"], ["1.png"]), None)

    def test_the_same_picture_under_two_names(self, folder: Path) -> None:
        (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
        self.lock(folder, "0.png", "1.png", "2.png", "copy.png")
        for calibrate, judge in ((["0.png", "copy.png"], ["1.png"]), (["0.png", "1.png"], ["2.png", "copy.png"])):
            with pytest.raises(ImageError, match=r"'0\.png' and 'copy\.png' of the recipe 'mine' are the same picture"):
                pictures_of(files_recipe(calibrate, judge), folder)

    def test_pictures_to_judge_by_are_looked_at_too(self, folder: Path) -> None:
        Image.new("RGB", (40, 30), "grey").save(folder / "1.png")
        self.lock(folder, "0.png", "1.png")
        with pytest.raises(ImageError, match=r"'1\.png' is a single colour"):
            pictures_of(files_recipe(["0.png"], ["1.png"]), folder)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("0.png\n", "line 1, is no sha256 and name"),
            (f"{'a' * 64}  0.png\n\n{'b' * 64} *0.png\n", r"line 3, contradicts an earlier one about 0\.png"),
            (f"{'A' * 64}  0.png\n", "line 1, is no sha256"),
        ],
    )
    def test_a_damaged_lock(self, folder: Path, text: str, said: str) -> None:
        (folder / LOCK).write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=said):
            pictures_of(files_recipe(["0.png"], ["1.png"]), folder)

    def test_a_lock_of_sha256sum(self, folder: Path) -> None:
        done = subprocess.run("sha256sum *.png", shell=True, cwd=folder, capture_output=True, text=True, check=True)
        (folder / LOCK).write_bytes(done.stdout.replace("\n", "\r\n").encode())
        assert locked_hashes(folder)["0.png"] == sha256(folder / "0.png")
        assert len(pictures_of(files_recipe(["0.png"], ["1.png"]), folder).calibrate) == 1

    def test_all_problems_are_errors_of_this_package(self, folder: Path) -> None:
        (folder / LOCK).write_bytes(b"\xff\xfe")
        with pytest.raises(HolovExportError, match="is not UTF-8"):
            pictures_of(files_recipe(["0.png"], ["1.png"]), folder)


class TestReadme:
    README = (CALIBRATION / "README.md").read_text(encoding="utf-8")
    EXAMPLES = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)

    def test_its_examples_are_recipes(self, tmp_path: Path) -> None:
        whole, packages, files = self.EXAMPLES
        path = tmp_path / "my-factory.toml"
        path.write_text(whole, encoding="utf-8")
        assert recipe_from_name(str(path)).folder == FolderPictures(count=128, judge=32)
        head = 'name = "x"\ntitle = "x"\nsource = '
        judged = packages[packages.index("[[calibrate]]") :].replace("calibrate", "judge")
        judged = judged.replace("coffee.png", "camera.png").replace("cc02f8ca", "00000000")
        path.write_text(f'{head}"packages"\n{packages}\n{judged}', encoding="utf-8")
        (shown,) = recipe_from_name(str(path)).calibrate
        assert shown in recipe_from_name("smoke-8").calibrate
        path.write_text(f'{head}"files"\n{files}', encoding="utf-8")
        assert len(recipe_from_name(str(path)).calibrate) == 2

    def test_it_names_every_recipe(self) -> None:
        assert not [name for name in recipe_names() if f"| `{name}` |" not in self.README]

    @pytest.mark.parametrize("model", [Recipe, PictureFile, PackageFacts, FolderPictures, Limits])
    def test_it_names_every_field(self, model: type[Frozen]) -> None:
        assert not [name for name in model.model_fields if not re.search(rf"[`\[ ]{name}[`\] ]", self.README)]
