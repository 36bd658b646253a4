"""Estimates where pictures have unequal numbers of tokens: the operations, parameters and tokens of the graphs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from family_bundles import family_plan, true_size
from family_checkpoints import write_family
from PIL import Image

from holov_export.cli import run
from holov_export.errors import UsageError
from holov_export.estimate.report import estimate
from holov_export.estimate.roofline import Machine, Shares, format_of
from holov_export.estimate.shapes import ModelShape, shape_from_name, shape_from_spec
from holov_export.estimate.stages import vision_seconds
from holov_export.spec import Cut, DecoderPrecision
from holov_export.targets import target_from_name
from holov_export.verify.operations_packed import operations_of_batch
from holov_export.verify.pictures import pixels_for
from holov_export.vision.families import FAMILIES

ORIN = target_from_name("jetson-agx-orin-64gb")
IDEAL = Shares(product=1, weight_only=1, attention=1, bandwidth=1, kernel_seconds=0, tile=(1, 1))
GRAPHS = [("llava_next", "image"), ("qwen2_5_vl", "image"), ("video_llava", "image"), ("video_llava", "video")]
Part = Literal["image", "video"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: write_family(folder / family, family) for family in dict(GRAPHS)}


def operations(shape: ModelShape, budget: int) -> float:
    """What the estimate counts: time on a machine of one operation a picosecond, where memory costs nothing."""
    rates = ORIN.rates.model_copy(update={"fp32": 1.0, "fp16": 1.0})
    machine = Machine(ORIN.model_copy(update={"rates": rates, "bandwidth_gbs": 1e9}), IDEAL)
    return vision_seconds(machine, shape, format_of(machine.target, "fp16"), budget=budget, batch=1) * 1e12


@pytest.mark.parametrize(("family", "part"), GRAPHS)
@pytest.mark.parametrize("method", ["holov", "holov-plus", "divprune", "none"])
def test_operations_are_those_of_the_graph(checkpoints: dict[str, Path], family: str, part: Part, method: str) -> None:
    plan = true_size(family_plan(checkpoints[family], method, part=part))
    size = (672, 448) if family != "video_llava" else None
    pixels = pixels_for(plan, [Image.new("RGB", size or (224, 224))])
    shape = shape_from_spec(plan.model, plan.policy, size=size, part=part)
    tokens = pixels.layouts[0].tokens if pixels.layouts else plan.tokens
    assert shape.vision.tokens == tokens
    for budget in (tokens // 9 // 8 * 8, tokens):
        counted = operations_of_batch(plan, pixels, budget)
        estimated = operations(shape, budget)
        if method == "divprune":  # the estimate counts the similarities of all pairs, too
            extra = 2 * tokens**2 * shape.vision.width
            assert counted * 0.98 < estimated < (counted + extra) * 1.02
        else:
            assert estimated == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(("family", "part"), GRAPHS)
def test_parameters_are_those_of_the_module(checkpoints: dict[str, Path], family: str, part: Part) -> None:
    plan = true_size(family_plan(checkpoints[family], part=part))
    with torch.device("meta"):
        module = FAMILIES[family].build(plan)
    mine = shape_from_spec(plan.model, plan.policy, part=part).vision_parameters
    assert mine == pytest.approx(sum(parameter.numel() for parameter in module.parameters()), rel=2e-3)


class TestTokens:
    def test_llava_next(self, checkpoints: dict[str, Path]) -> None:
        """The largest picture fills four tiles; of a thin one the padding is no token, but the tower sees it."""
        model = true_size(family_plan(checkpoints["llava_next"])).model
        policy = family_plan(checkpoints["llava_next"]).policy
        largest = shape_from_spec(model, policy).vision
        assert (largest.tokens, largest.views, largest.rows) == (2880, 5, 5 * 577)
        assert largest.projectable == 2880
        photograph = shape_from_spec(model, policy, size=(640, 480)).vision
        assert (photograph.tokens, photograph.views) == (576 + 36 * 48, 5)
        assert photograph.projectable == 2880
        assert shape_from_spec(model, policy, size=(1000, 300)).vision.views == 4

    def test_qwen(self, checkpoints: dict[str, Path]) -> None:
        plan = true_size(family_plan(checkpoints["qwen2_5_vl"]))
        largest = shape_from_spec(plan.model, plan.policy).vision
        assert largest.tokens == plan.model.image_tokens == 16384
        vision = shape_from_spec(plan.model, plan.policy, size=(1280, 960)).vision
        assert (vision.tokens, vision.rows) == (46 * 34, 46 * 34 * 4)
        assert (vision.window_rows, vision.full_layers, vision.layers) == (64, 4, 32)

    def test_video_llava(self, checkpoints: dict[str, Path]) -> None:
        plan = true_size(family_plan(checkpoints["video_llava"]))
        picture = shape_from_spec(plan.model, plan.policy).vision
        clip = shape_from_spec(plan.model, plan.policy, part="video").vision
        assert (picture.tokens, picture.rows, picture.attends_all) == (256, 257, False)
        assert (clip.tokens, clip.views, clip.rows) == (2056, 8, 2056)


class TestRefusals:
    def test_a_size_that_decides_nothing(self, checkpoints: dict[str, Path]) -> None:
        plan = family_plan(checkpoints["video_llava"])
        for part, tokens in (("image", 16), ("video", 136)):
            with pytest.raises(UsageError, match=f"whatever its size, it has {tokens} tokens"):
                shape_from_spec(plan.model, plan.policy, size=(10, 10), part=part)  # type: ignore[arg-type]

    @pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
    def test_what_has_no_fixed_number_of_tokens(self, checkpoints: dict[str, Path], family: str) -> None:
        plan = family_plan(checkpoints[family])
        with pytest.raises(UsageError, match="only pictures are estimated"):
            shape_from_spec(plan.model, plan.policy, part="video")
        with pytest.raises(UsageError, match="would be refused"):
            shape_from_spec(plan.model, plan.policy, size=(100_000, 100_000))
        with pytest.raises(UsageError, match="at the end of the tower only"):
            shape_from_spec(plan.model, plan.policy, (Cut(layer=1),))


def test_more_tokens_take_longer_and_are_said(checkpoints: dict[str, Path]) -> None:
    plan = true_size(family_plan(checkpoints["qwen2_5_vl"]))
    shapes = [shape_from_spec(plan.model, plan.policy, size=(side, side)) for side in (224, 448, 896)]
    found = [estimate(shape, ORIN, precision="fp16", decoder=DecoderPrecision.INT4, context=1200) for shape in shapes]
    assert [each.rows[0].budget for each in found] == [64, 256, 1024]
    for less, more in pairwise(found):
        assert less.rows[0].vision_ms < more.rows[0].vision_ms
        assert less.rows[0].memory.vision_activations < more.rows[0].memory.vision_activations
    assert "the tower sees 4096 patches" in " ".join(found[-1].assumptions)


def test_thirteen_billion() -> None:
    """Vicuna-13B has 13.016e9 parameters: those of LLaMA-13B and 64 more words."""
    large, small = shape_from_name("llava-1.5-13b"), shape_from_name("llava-1.5-7b")
    decoder = large.decoder
    language = decoder.layers * decoder.layer_parameters + 2 * decoder.vocab_size * decoder.width
    assert language == pytest.approx(13.016e9, rel=1e-3)
    # the towers are alike, the projectors are not
    difference = 1024 * (5120 - 4096) + 5120**2 - 4096**2
    assert large.vision_parameters - small.vision_parameters == difference


class TestCommand:
    def line(self, folder: Path, *more: str) -> list[str]:
        return ["estimate", str(folder), "--target", ORIN.name, "--json", *more]

    def test_a_size(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert run(self.line(checkpoints["qwen2_5_vl"], "--size", "280x280")) == 0
        assert [row["budget"] for row in json.loads(capsys.readouterr().out)["rows"]] == [100, 33, 11]
        assert run(self.line(checkpoints["qwen2_5_vl"])) == 0
        assert json.loads(capsys.readouterr().out)["rows"][0]["budget"] == 200

    def test_a_clip(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert run(self.line(checkpoints["video_llava"], "--video")) == 0
        assert json.loads(capsys.readouterr().out)["rows"][0]["budget"] == 136

    @pytest.mark.parametrize("words", ["280", "280x", "x280", "0x5", "-1x5", "axb"])
    def test_words_that_are_no_size(
        self, checkpoints: dict[str, Path], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(self.line(checkpoints["qwen2_5_vl"], f"--size={words}")) == 2
        assert "is no size such as" in capsys.readouterr().err

    @pytest.mark.parametrize("more", [("--size", "100x100"), ("--video",)])
    def test_a_shape_that_ships_is_of_square_pictures(
        self, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["estimate", "llava-1.5-7b", "--target", ORIN.name, *more]) == 2
        assert "takes pictures only, and all have as many tokens" in capsys.readouterr().err
