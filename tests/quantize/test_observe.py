"""Ranges of activations: what is seen, what is left out, what is refused, and runs that end before their time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from calibration_material import grey, named, recipe_of, watched_toy
from engine_bundles import family_bundle as shared_bundle
from family_bundles import family_bundle
from PIL import Image
from toys import toy_tokens

from holov_export.bundle import Bundle
from holov_export.errors import CheckFailedError, EnvironmentFaultError, StorageError, UsageError
from holov_export.quantize.linears import linears_of
from holov_export.quantize.observe import observe, size_from_budget
from holov_export.quantize.ranges import ChannelRange, Ranges, RangesRecord, TensorRange, outlier_channels, summary_of
from holov_export.quantize.watched import real_rows, watched_graph
from holov_export.recipes import NamedPicture, recipe_sha256
from holov_export.runtime.engine_choice import graph_hashes
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.spec import ModelSpec, Precision, Quantization, QuantizedType
from holov_export.verify.vision_loss import tokens_of


@pytest.fixture
def pictures(tmp_path: Path, photographs: list[Image.Image]) -> tuple[NamedPicture, ...]:
    return named(tmp_path / "pictures", photographs[:3])


@pytest.fixture
def toy(tmp_path: Path, llava_spec: ModelSpec) -> Bundle:
    return watched_toy(tmp_path / "toy", llava_spec)


def same(one: Ranges, other: Ranges) -> None:
    """Bit-equal in all but the time that they took."""
    when = {"created": "", "seconds": 0.0}
    assert one.record.model_copy(update=when) == other.record.model_copy(update=when)
    assert list(one.channels) == list(other.channels)
    for name, channel in one.channels.items():
        np.testing.assert_array_equal(channel.low, other.channels[name].low)
        np.testing.assert_array_equal(channel.high, other.channels[name].high)


@dataclass
class Heard:
    """What a calibration said of itself."""

    said: list[str]
    advanced: list[int]

    def tell(self, message: str) -> None:
        self.said.append(message)

    def advance(self, pictures: int) -> None:
        self.advanced.append(pictures)


def heard() -> Heard:
    return Heard([], [])


class TestWhatIsSeen:
    def test_channels_and_tensors_are_those_of_numpy(
        self, toy: Bundle, pictures: Sequence[NamedPicture], llava_spec: ModelSpec
    ) -> None:
        found = observe(toy, recipe_of(budgets=(5, "1/9")), pictures)
        pixels = pixels_from_pictures([picture.image() for picture in pictures], llava_spec).pixel_values
        kept = toy_tokens(np.asarray(pixels), llava_spec)[:, :7]  # a ninth of 64
        assert list(found.record.tensors) == ["patches", "kept"]
        assert found.record.budgets == (5, 7)
        channels = found.channels["kept"]
        np.testing.assert_allclose(channels.low, kept.min((0, 1)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(channels.high, kept.max((0, 1)), rtol=1e-4, atol=1e-5)
        assert found.record.tensors["kept"].low == float(channels.low.min())
        assert found.record.tensors["patches"].high == float(pixels.max())
        assert channels.low.dtype == np.float32

    def test_the_record_says_what_was_run(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        recipe = recipe_of()
        record = observe(toy, recipe, pictures).record
        assert (record.graph_sha256, record.weights_sha256) == graph_hashes(toy)
        assert (record.recipe, record.recipe_sha256) == ("mine", recipe_sha256(recipe))
        assert record.pictures == tuple((picture.name, picture.sha256) for picture in pictures)
        assert record.budgets == (7, 64)
        assert RangesRecord.model_validate_json(record.model_dump_json()) == record

    def test_what_does_not_depend_on_the_budget_is_counted_once(
        self, toy: Bundle, pictures: Sequence[NamedPicture], llava_spec: ModelSpec, tmp_path: Path
    ) -> None:
        with watched_graph(toy, 1) as watched:
            assert (watched.names, watched.moving) == (("patches", "kept"), {"kept"})
        observe(toy, recipe_of(algorithm="percentile", budgets=(5, 7)), pictures, partial=tmp_path / "seen.npz")
        with np.load(tmp_path / "seen.npz") as state:
            patches, kept = state["counts"].sum(1)
        side = llava_spec.clip.image_size
        assert patches == len(pictures) * 3 * side * side
        assert kept == len(pictures) * (5 + 7) * llava_spec.decoder.width

    def test_percentiles_leave_out_rare_values(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        whole = observe(toy, recipe_of(), pictures).record.tensors["kept"]
        cut = observe(toy, recipe_of(algorithm="percentile", percentile=90.0), pictures).record.tensors["kept"]
        assert whole.low < cut.low < cut.high < whole.high
        rare = observe(toy, recipe_of(algorithm="percentile", percentile=99.99999), pictures).record.tensors["kept"]
        assert rare == whole, "whole bins end behind the largest value, the range does not"

    def test_entropy_gives_a_symmetric_range_within_the_whole(
        self, toy: Bundle, pictures: Sequence[NamedPicture]
    ) -> None:
        whole = observe(toy, recipe_of(), pictures[:1]).record.tensors["kept"]
        cut = observe(toy, recipe_of(algorithm="entropy"), pictures[:1]).record.tensors["kept"]
        assert whole.low <= cut.low <= cut.high <= whole.high
        assert max(-cut.low, cut.high) < max(-whole.low, whole.high)

    def test_a_half_precision_graph_runs_as_it_is(
        self, tmp_path: Path, llava_spec: ModelSpec, toy: Bundle, pictures: Sequence[NamedPicture]
    ) -> None:
        half = watched_toy(tmp_path / "half", llava_spec, precision=Precision.FP16)
        found, wide = (observe(bundle, recipe_of(), pictures) for bundle in (half, toy))
        assert found.channels["kept"].low.dtype == np.float32
        np.testing.assert_allclose(found.channels["kept"].high, wide.channels["kept"].high, rtol=0.01, atol=0.02)
        assert found.record.tensors["patches"] != wide.record.tensors["patches"], "rounded"

    def test_budgets_are_numbers_shares_or_all(self) -> None:
        assert [tokens_of(size_from_budget(budget), 576) for budget in (9, "1/9", "1/7", "all", 9999)] == [
            9,
            64,
            82,
            576,
            576,
        ]


class TestTheTrueGraph:
    def test_ranges_are_those_of_torch(
        self, exported_bundle: Bundle, llava_checkpoint: Path, pictures: Sequence[NamedPicture]
    ) -> None:
        """Every Linear's input, by torch's own hooks; not the last query's, which the graph has two products of."""
        from torch import nn

        from holov_export.verify.backends import tokens_from_torch
        from holov_export.vision.families import vision_from_plan
        from holov_export.vision.weights import SafetensorsReader

        plan = exported_bundle.manifest.plan
        with SafetensorsReader(llava_checkpoint) as reader:
            module = vision_from_plan(plan, reader, Precision.FP32)
        lows: dict[str, list[np.ndarray]] = {}
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(
                    lambda part, given, name=name: lows.setdefault(name, []).append(given[0].detach().numpy())
                )
        for picture in pictures:
            for budget in (7, 64):
                tokens_from_torch(module, plan, pixels_from_pictures([picture.image()], plan.model), budget, [budget])
        with watched_graph(exported_bundle, 1) as watched:
            assert len(watched.names) == len(set(watched.names)) == 16
        found = observe(exported_bundle, recipe_of(), pictures, threads=1)
        linears = linears_of(onnx.load(str(exported_bundle.vision), load_external_data=False))
        assert set(found.channels) == {name for linear in linears for name in linear.activations}
        compared = [linear for linear in linears if len(linear.activations) == 1]
        assert len(compared) == 19
        for linear in compared:
            seen = [values.reshape(-1, values.shape[-1]) for values in lows[linear.name]]
            channels = found.channels[linear.activations[0]]
            np.testing.assert_allclose(channels.low, np.concatenate(seen).min(0), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(channels.high, np.concatenate(seen).max(0), rtol=1e-3, atol=1e-4)

    def test_the_bundle_may_be_on_a_disk_that_cannot_be_written(
        self, exported_bundle: Bundle, pictures: Sequence[NamedPicture]
    ) -> None:
        before = sorted(path.name for path in exported_bundle.folder.rglob("*"))
        with watched_graph(exported_bundle, 1):
            assert sorted(path.name for path in exported_bundle.folder.rglob("*")) == before

    def test_a_graph_without_its_weights_is_an_error(self, exported_bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / exported_bundle.graph).write_bytes(exported_bundle.vision.read_bytes())
        with (
            pytest.raises(EnvironmentFaultError, match=r"cannot load vision\.onnx"),
            watched_graph(Bundle(tmp_path, exported_bundle.manifest), 1),
        ):
            pass


@pytest.mark.slow
class TestFamilies:
    def test_pictures_and_clips_of_a_model_with_two_towers(
        self, tmp_path: Path, pictures: Sequence[NamedPicture]
    ) -> None:
        bundle = family_bundle(tmp_path / "family", "video_llava").bundle
        for view in bundle.views:
            with watched_graph(view, 1) as watched:
                assert watched.moving
                assert not any("/layers/0/" in name for name in watched.moving), "in front of the selection"
            few, every = (observe(view, recipe_of(budgets=sizes), pictures) for sizes in (("1/9",), ("1/9", "all")))
            assert every.record.budgets == (few.record.budgets[0], view.manifest.plan.tokens)
            for name, channels in few.channels.items():
                whole = every.channels[name]
                assert (whole.low <= channels.low).all()
                assert (channels.high <= whole.high).all()
                if name not in watched.moving:
                    np.testing.assert_array_equal(channels.high, whole.high)

    def test_a_bfloat16_graph_is_widened(
        self, tmp_path_factory: pytest.TempPathFactory, pictures: Sequence[NamedPicture]
    ) -> None:
        narrow, wide = (
            shared_bundle("llava_next", kind, tmp_path_factory) for kind in (Precision.BF16, Precision.FP32)
        )
        beside = sorted(path.name for path in narrow.folder.parent.iterdir())
        found, expected = (observe(bundle, recipe_of(), pictures) for bundle in (narrow, wide))
        assert sorted(path.name for path in narrow.folder.parent.iterdir()) == beside, "nothing is left"
        assert len(found.channels) == len(expected.channels) == 16
        for one, other in zip(found.channels.values(), expected.channels.values(), strict=True):
            np.testing.assert_allclose(one.high, other.high, rtol=0.05, atol=0.1)


class TestPadding:
    def test_rows_that_an_image_did_not_fill_widen_nothing(
        self, tmp_path: Path, llava_spec: ModelSpec, pictures: Sequence[NamedPicture]
    ) -> None:
        bundle = watched_toy(tmp_path / "padded", llava_spec, missing=3)
        found = observe(bundle, recipe_of(budgets=(7,)), pictures)
        pixels = pixels_from_pictures([picture.image() for picture in pictures], llava_spec).pixel_values
        tokens = toy_tokens(np.asarray(pixels), llava_spec)
        np.testing.assert_allclose(found.channels["kept"].high, tokens[:, :4].max((0, 1)), rtol=1e-4, atol=1e-5)
        assert (tokens[:, :7].max((0, 1)) > found.channels["kept"].high + 0.01).any(), "padding is larger here"

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((2, 3, 1), [0, 1, 3]),
            ((2, 4, 1), [0, 1, 2, 4, 5]),  # CLS in front
            ((6, 1), [0, 1, 3]),
            ((12, 1), [0, 1, 2, 3, 6, 7]),  # two patches of each token
            ((5, 1), [0, 1, 2, 3, 4]),  # none of these: all
        ],
    )
    def test_rows_are_found_whatever_lies_in_front_of_the_width(
        self, shape: tuple[int, ...], expected: list[int]
    ) -> None:
        positions = np.array([[5, 2, -1], [0, -1, -1]])
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        assert real_rows(values, positions)[:, 0].tolist() == expected

    def test_a_full_budget_leaves_all_rows(self) -> None:
        values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
        np.testing.assert_array_equal(real_rows(values, np.zeros((2, 3), np.int64)), values.reshape(6, 2))


class TestRefusals:
    def test_an_activation_that_is_not_a_number(self, tmp_path: Path, llava_spec: ModelSpec) -> None:
        bundle = watched_toy(tmp_path / "roots", llava_spec, first=("Sqrt",))
        seen = named(tmp_path / "grey", [grey(250), grey(0), grey(250)])
        partial = tmp_path / "seen.npz"
        with pytest.raises(CheckFailedError, match=r"'patches_1' is not finite .* picture '1\.png'"):
            observe(bundle, recipe_of(), seen, partial=partial)
        again = heard()
        with pytest.raises(CheckFailedError, match=r"1\.png"):
            observe(bundle, recipe_of(), seen, partial=partial, advance=again.advance)
        assert again.advanced == [1], "the first picture is kept, the second is not"

    def test_an_activation_that_overflows(
        self, tmp_path: Path, llava_spec: ModelSpec, pictures: Sequence[NamedPicture]
    ) -> None:
        bundle = watched_toy(tmp_path / "large", llava_spec, first=("Exp", "Exp", "Exp"), precision=Precision.FP16)
        with pytest.raises(CheckFailedError, match=r"'patches_3' is not finite .*float16 ends at 65504"):
            observe(bundle, recipe_of(), pictures[:1])

    def test_an_activation_that_is_zero_is_told(self, tmp_path: Path, llava_spec: ModelSpec) -> None:
        bundle = watched_toy(tmp_path / "nothing", llava_spec, first=("Mul",))
        for algorithm in ("minmax", "percentile", "entropy"):
            listener = heard()
            recipe = recipe_of(algorithm=algorithm)
            found = observe(bundle, recipe, named(tmp_path / "grey", [grey(9)]), tell=listener.tell)
            assert found.record.tensors["patches_1"] == TensorRange(low=0.0, high=0.0)
            assert any(said.startswith("'patches_1' is zero on every picture") for said in listener.said)

    def test_no_pictures(self, toy: Bundle) -> None:
        with pytest.raises(UsageError, match="no pictures"):
            observe(toy, recipe_of(), [])

    def test_a_graph_that_is_quantised(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        plan = toy.manifest.plan.model_copy(update={"quantization": Quantization(type=QuantizedType.INT8)})
        with pytest.raises(UsageError, match=r"'toy' is quantised already \(int8\)"):
            observe(Bundle(toy.folder, toy.manifest.model_copy(update={"plan": plan})), recipe_of(), pictures)


ENDS = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from calibration_material import recipe_of
from holov_export.bundle import open_bundle
from holov_export.quantize.observe import observe
from holov_export.recipes import NamedPicture
from holov_export.storage import sha256_of

done = 0
def advance(pictures):
    global done
    done += pictures
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

paths = [Path(name) for name in sys.argv[5:]]
pictures = [NamedPicture(path.name, sha256_of(path), path) for path in paths]
recipe, partial = recipe_of(algorithm="percentile"), Path(sys.argv[4])
observe(open_bundle(sys.argv[3]), recipe, pictures, partial=partial, advance=advance)
"""


class TestGoingOn:
    def test_a_killed_run_goes_on_and_finds_the_same(
        self, toy: Bundle, pictures: Sequence[NamedPicture], tmp_path: Path
    ) -> None:
        recipe, partial, here = recipe_of(algorithm="percentile"), tmp_path / "seen.npz", Path(__file__).parent
        paths = [str(picture.path) for picture in pictures]
        line = [sys.executable, "-c", ENDS, str(here), str(here.parent), str(toy.folder), str(partial), *paths]
        assert subprocess.run(line, capture_output=True, check=False).returncode == -9
        listener = heard()
        found = observe(toy, recipe, pictures, partial=partial, tell=listener.tell, advance=listener.advance)
        assert listener.advanced == [2, 1], "only the last picture was run"
        assert listener.said == []
        same(found, observe(toy, recipe, pictures))
        done = heard()
        same(found, observe(toy, recipe, pictures, partial=partial, advance=done.advance))
        assert done.advanced == [3]

    @pytest.mark.parametrize("change", ["recipe", "pictures", "graph"])
    def test_a_state_of_something_else_is_replaced(
        self, toy: Bundle, pictures: Sequence[NamedPicture], tmp_path: Path, llava_spec: ModelSpec, change: str
    ) -> None:
        partial = tmp_path / "seen.npz"
        observe(toy, recipe_of(), pictures[:2], partial=partial)
        recipe = recipe_of(seed=1) if change == "recipe" else recipe_of()
        other = watched_toy(tmp_path / "other", llava_spec, missing=1) if change == "graph" else toy
        seen = pictures[1:] if change == "pictures" else pictures[:2]
        listener = heard()
        found = observe(other, recipe, seen, partial=partial, tell=listener.tell, advance=listener.advance)
        assert (listener.advanced, listener.said) == ([0, 1, 1], [])
        same(found, observe(other, recipe, seen))
        again = heard()
        observe(other, recipe, seen, partial=partial, advance=again.advance)
        assert again.advanced == [2], "the file is that of the new question"

    @pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
    def test_a_damaged_state_is_told_and_ignored(
        self, toy: Bundle, pictures: Sequence[NamedPicture], tmp_path: Path, damage: str
    ) -> None:
        partial = tmp_path / "seen.npz"
        observe(toy, recipe_of(), pictures[:2], partial=partial)
        content = bytearray(partial.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 0xFF
        partial.write_bytes({"cut": content[:-100], "text": b"{}", "empty": b"", "flipped": content}[damage])
        listener = heard()
        found = observe(toy, recipe_of(), pictures[:2], partial=partial, tell=listener.tell, advance=listener.advance)
        assert listener.advanced == [0, 1, 1]
        assert "seen.npz is damaged" in listener.said[0]
        same(found, observe(toy, recipe_of(), pictures[:2]))

    def test_a_state_that_cannot_be_written_is_an_error(self, toy: Bundle, pictures: Sequence[NamedPicture]) -> None:
        with pytest.raises(StorageError, match="cannot write"):
            observe(toy, recipe_of(), pictures[:1], partial=toy.folder / "missing" / "seen.npz")


class TestSummary:
    def test_outliers_stick_out_of_their_own_activation(self) -> None:
        low, high = np.full(8, -1.0, np.float32), np.full(8, 0.5, np.float32)
        low[2], high[5], high[6] = -6.5, 7.0, 5.9
        assert np.flatnonzero(outlier_channels(ChannelRange(low, high))).tolist() == [2, 5]

    def test_the_widest_and_the_narrowest_are_named_by_their_product(
        self, exported_bundle: Bundle, pictures: Sequence[NamedPicture]
    ) -> None:
        linears = linears_of(onnx.load(str(exported_bundle.vision), load_external_data=False))
        found = observe(exported_bundle, recipe_of(), pictures[:1])
        summary = summary_of(found, linears)
        sizes = {name: max(-item.low, item.high) for name, item in found.record.tensors.items()}
        assert summary.widest.largest == max(sizes.values())
        assert summary.narrowest.largest == min(sizes.values())
        assert summary.activations == 16
        assert summary.widest.linear in {linear.name for linear in linears}
        assert summary.widest.activation in next(
            linear.activations for linear in linears if linear.name == summary.widest.linear
        )
