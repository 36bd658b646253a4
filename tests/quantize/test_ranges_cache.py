"""Ranges that a bundle keeps: found again, refused when they are of something else, and never half there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from calibration_material import grey, named, recipe_of, watched_toy
from PIL import Image

from holov_export.bundle import CALIBRATION, Bundle, open_bundle
from holov_export.errors import BundleError, CheckFailedError, IntegrityError, StorageError, UsageError
from holov_export.quantize.cache import CHANNELS, RECORD, calibrated, ranges_folder, ranges_in
from holov_export.quantize.ranges import Ranges
from holov_export.recipes import NamedPicture
from holov_export.spec import ModelSpec


@pytest.fixture
def pictures(tmp_path: Path, photographs: list[Image.Image]) -> tuple[NamedPicture, ...]:
    return named(tmp_path / "pictures", photographs[:2])


@pytest.fixture
def toy(tmp_path: Path, llava_spec: ModelSpec) -> Bundle:
    return watched_toy(tmp_path / "toy", llava_spec)


def equal(one: Ranges, other: Ranges | None) -> bool:
    return (
        other is not None
        and one.record == other.record
        and all(
            np.array_equal(item.low, other.channels[name].low) and np.array_equal(item.high, other.channels[name].high)
            for name, item in one.channels.items()
        )
    )


class Counter:
    """Counts the pictures that were run, not those that were known."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.said: list[str] = []

    def advance(self, pictures: int) -> None:
        self.steps.append(pictures)

    def tell(self, message: str) -> None:
        self.said.append(message)


class TestKept:
    def test_what_was_made_is_found_again(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        recipe = recipe_of()
        assert ranges_in(toy, recipe) is None
        made = calibrated(toy, recipe, pictures)
        assert equal(made, ranges_in(toy, recipe, pictures))
        counter = Counter()
        assert equal(made, calibrated(toy, recipe, pictures, advance=counter.advance, tell=counter.tell))
        assert (counter.steps, counter.said) == ([2], [])
        folder = toy.folder / CALIBRATION / "mine"
        assert sorted(path.name for path in folder.iterdir()) == [CHANNELS, RECORD]
        assert [path.name for path in folder.parent.iterdir()] == ["mine"], "no state, no lock is left"

    def test_the_bundle_stays_what_was_exported(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        calibrated(toy, recipe_of(), pictures)
        assert open_bundle(toy.folder).manifest == toy.manifest

    def test_each_graph_has_a_folder(self, exported_bundle: Bundle) -> None:
        scope = exported_bundle.manifest.plan.model_copy(
            update={"also": exported_bundle.manifest.plan.graphs[:1]}, deep=True
        )
        graph = scope.also[0].model_copy(update={"policy": scope.policy.model_copy(update={"method": "cls-topk"})})
        both = Bundle(exported_bundle.folder, exported_bundle.manifest, (exported_bundle.graphs[0], graph))
        assert ranges_folder(both, "smoke-8").name == "smoke-8"
        assert ranges_folder(both.of_method("cls-topk"), "smoke-8").name == "smoke-8-cls-topk"

    def test_again_runs_again(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        made = calibrated(toy, recipe_of(), pictures)
        (ranges_folder(toy, "mine") / CHANNELS).write_bytes(b"damaged")
        counter = Counter()
        fresh = calibrated(toy, recipe_of(), pictures, again=True, advance=counter.advance)
        assert counter.steps == [0, 1, 1]
        assert fresh.record.tensors == made.record.tensors
        assert equal(fresh, ranges_in(toy, recipe_of()))


class TestOfSomethingElse:
    def test_another_recipe_of_that_name(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        calibrated(toy, recipe_of(), pictures)
        counter = Counter()
        assert ranges_in(toy, recipe_of(seed=4), tell=counter.tell) is None
        assert counter.said == ["the ranges in calibration/mine are of another 'mine': the recipe has changed"]
        calibrated(toy, recipe_of(seed=4), pictures)
        assert ranges_in(toy, recipe_of(seed=4)) is not None

    def test_another_graph(
        self, toy: Bundle, pictures: Sequence[NamedPicture], llava_spec: ModelSpec, tmp_path: Path
    ) -> None:
        calibrated(toy, recipe_of(), pictures)
        other = watched_toy(tmp_path / "other", llava_spec, missing=1)
        shutil.copytree(toy.folder / CALIBRATION, other.folder / CALIBRATION)
        counter = Counter()
        assert ranges_in(other, recipe_of(), tell=counter.tell) is None
        assert counter.said == ["the ranges in calibration/mine are of another graph or other weights"]

    def test_other_pictures_of_a_folder(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        made = calibrated(toy, recipe_of(), pictures)
        counter = Counter()
        assert ranges_in(toy, recipe_of(), pictures[:1], tell=counter.tell) is None
        assert counter.said == ["the ranges in calibration/mine are of other pictures"]
        assert equal(made, ranges_in(toy, recipe_of())), "whoever does not say which takes any"
        assert calibrated(toy, recipe_of(), pictures[:1]).record.pictures == made.record.pictures[:1]


def without_last_key(text: str) -> str:
    raw = json.loads(text)
    raw.popitem()
    return json.dumps(raw)


class TestDamage:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda text: text[:-20], "are damaged"),
            (lambda text: "[]", "are damaged"),
            (lambda text: text.replace('"minmax"', '"best"'), "algorithm"),
            (without_last_key, "Field required"),
            (lambda text: text.replace('"kept"', '"cept"', 1).replace('"low"', '"lou"', 1), "does not parse"),
        ],
    )
    def test_of_the_record(
        self, toy: Bundle, pictures: Sequence[NamedPicture], change: Callable[[str], str], words: str
    ) -> None:
        calibrated(toy, recipe_of(), pictures)
        path = ranges_folder(toy, "mine") / RECORD
        path.write_text(change(path.read_text()))
        for read in (lambda: ranges_in(toy, recipe_of()), lambda: calibrated(toy, recipe_of(), pictures)):
            with pytest.raises(IntegrityError, match=words) as caught:
                read()
            assert caught.value.hint == "Delete the folder, or calibrate again: holov-export calibrate --again"

    @pytest.mark.parametrize("damage", ["cut", "flipped", "one less", "not finite", "double"])
    def test_of_the_channels(self, toy: Bundle, pictures: Sequence[NamedPicture], damage: str) -> None:
        calibrated(toy, recipe_of(), pictures)
        path = ranges_folder(toy, "mine") / CHANNELS
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        with np.load(path) as stored:
            arrays = dict(stored)
        if damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            path.write_bytes(content)
        else:
            arrays["low1"] = {
                "one less": arrays["low1"][:0],
                "not finite": arrays["low1"] * np.float32(np.nan),
                "double": arrays["low1"].astype(np.float64),
            }[damage]
            if damage == "one less":
                del arrays["low1"]
            np.savez(path, **arrays)
        with pytest.raises(IntegrityError, match="are damaged"):
            ranges_in(toy, recipe_of())

    @pytest.mark.parametrize("name", [RECORD, CHANNELS])
    def test_a_missing_file_is_named(self, toy: Bundle, pictures: Sequence[NamedPicture], name: str) -> None:
        calibrated(toy, recipe_of(), pictures)
        (ranges_folder(toy, "mine") / name).unlink()
        with pytest.raises(IntegrityError, match=f"has no {name}"):
            ranges_in(toy, recipe_of())

    def test_a_later_schema(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        calibrated(toy, recipe_of(), pictures)
        path = ranges_folder(toy, "mine") / RECORD
        path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
        with pytest.raises(BundleError, match="has schema 2"):
            ranges_in(toy, recipe_of())


class TestNothingHalf:
    def test_a_failure_keeps_nothing(self, tmp_path: Path, llava_spec: ModelSpec) -> None:
        bundle = watched_toy(tmp_path / "roots", llava_spec, first=("Sqrt",))
        with pytest.raises(CheckFailedError):
            calibrated(bundle, recipe_of(), named(tmp_path / "grey", [grey(0)]))
        assert not (bundle.folder / CALIBRATION).exists()

    def test_a_failure_leaves_the_old_ranges(
        self, tmp_path: Path, llava_spec: ModelSpec, pictures: Sequence[NamedPicture]
    ) -> None:
        bundle = watched_toy(tmp_path / "roots", llava_spec, first=("Sqrt",))
        bright = named(tmp_path / "bright", [grey(250)])
        made = calibrated(bundle, recipe_of(), bright)
        with pytest.raises(CheckFailedError):
            calibrated(bundle, recipe_of(), named(tmp_path / "dark", [grey(250), grey(0)]))
        assert equal(made, ranges_in(bundle, recipe_of(), bright))

    def test_an_interrupted_run_goes_on(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        def interrupt(done: int) -> None:
            if done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrated(toy, recipe_of(), pictures, advance=interrupt)
        assert ranges_in(toy, recipe_of()) is None
        counter = Counter()
        made = calibrated(toy, recipe_of(), pictures, advance=counter.advance)
        assert counter.steps == [1, 1]
        assert equal(made, ranges_in(toy, recipe_of(), pictures))
        assert [path.name for path in (toy.folder / CALIBRATION).iterdir()] == ["mine"]

    def test_a_bundle_that_cannot_be_written_to(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        (toy.folder / CALIBRATION).write_text("in the way")
        counter = Counter()
        with pytest.raises(StorageError, match="cannot write to"):
            calibrated(toy, recipe_of(), pictures, advance=counter.advance)
        assert counter.steps == [], "before any picture is run"

    def test_a_folder_of_something_else(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        ranges_folder(toy, "mine").mkdir(parents=True)
        (ranges_folder(toy, "mine") / "notes.txt").write_text("mine")
        for again in (False, True):
            with pytest.raises(IntegrityError, match=r"has no ranges\.json"):
                calibrated(toy, recipe_of(), pictures, again=again)

    def test_no_pictures_is_an_error_even_with_ranges_at_hand(
        self, toy: Bundle, pictures: Sequence[NamedPicture]
    ) -> None:
        calibrated(toy, recipe_of(), pictures)
        with pytest.raises(UsageError, match="no pictures"):
            calibrated(toy, recipe_of(), [])
