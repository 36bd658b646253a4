"""Cuts inside the tower: the layers behind a cut see the kept tokens and CLS, and nothing else has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noisy import noisy_copy
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from holov_export.policies import POLICIES, policy_from_settings
from holov_export.selection.reference import positions_of
from holov_export.spec import Cut, ModelSpec, Precision
from holov_export.vision.clip import LlavaVision, vision_from_checkpoint
from holov_export.vision.cutting import real_rows_mask, row_index, spread
from holov_export.vision.weights import SafetensorsReader

EXACT: dict[str, float] = {"rtol": 2e-5, "atol": 2e-6}
IMAGES = 3


@pytest.fixture(scope="module")
def checkpoint(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy_copy(llava_checkpoint, tmp_path_factory.mktemp("cuts") / "noisy")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    loaded = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def pixels(llava_spec: ModelSpec) -> Tensor:
    side = llava_spec.vision.image_size
    return torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(1))


def vision_of(folder: Path, spec: ModelSpec, method: str, *cuts: Cut) -> LlavaVision:
    with SafetensorsReader(folder) as reader:
        return vision_from_checkpoint(spec, policy_from_settings(method), reader, Precision.FP32, cuts)


def run(module: LlavaVision, pixels: Tensor, budget: int, quota: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        out: tuple[Tensor, Tensor, Tensor, Tensor] = module(pixels, torch.tensor([budget]), torch.tensor(quota))
    return out


def by_hand(model: Any, pixels: Tensor, feature_layer: int, cuts: list[tuple[int, list[int]]]) -> Tensor:
    """[K, D] of one picture: transformers' own layers, rows taken out of their outputs by plain indexing.

    `cuts` name a layer and the raster positions that stay behind it.
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    kept = dict(cuts)
    places: list[int] | None = None
    with torch.no_grad():
        x = tower.pre_layrnorm(tower.embeddings(pixels[None]))
        for index, layer in enumerate(tower.encoder.layers[: feature_layer + 1]):
            out = layer(x, None)
            x = out[0] if isinstance(out, tuple) else out
            if index in kept:
                wanted = kept[index]
                rows = wanted if places is None else [places.index(position) for position in wanted]
                x, places = x[:, [0, *(row + 1 for row in rows)]], wanted
        tokens: Tensor = model.model.multi_modal_projector(x[:, 1:])[0]
    return tokens


@pytest.mark.parametrize("method", [name for name, policy in POLICIES.items() if policy.in_tower])
def test_a_cut_at_the_feature_layer_is_no_change(
    method: str, checkpoint: Path, llava_spec: ModelSpec, pixels: Tensor
) -> None:
    usual = run(vision_of(checkpoint, llava_spec, method), pixels, 12, [12, 5, 1])
    named = Cut(layer=llava_spec.vision.feature_layer)
    same = run(vision_of(checkpoint, llava_spec, method, named), pixels, 12, [12, 5, 1])
    for before, after in zip(usual, same, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("method", [name for name, policy in POLICIES.items() if policy.in_tower])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("budget", "quota"), [(12, [12, 5, 1]), (64, [64, 63, 2]), (1, [1, 1, 1])])
def test_layers_behind_a_cut_see_what_stays(
    method: str, layer: int, budget: int, quota: list[int], checkpoint: Path, llava_spec: ModelSpec, pixels: Tensor,
    model: Any,
) -> None:  # fmt: skip
    feature_layer = llava_spec.vision.feature_layer
    assert layer < feature_layer
    module = vision_of(checkpoint, llava_spec, method, Cut(layer=layer))
    tokens, positions, counts, saliency = run(module, pixels, budget, quota)
    assert counts.tolist() == quota
    policy, features = policy_from_settings(method), module.features_of(pixels).detach().numpy()
    for image, asked in enumerate(quota):
        kept = positions[image, :asked].tolist()
        expected = positions_of(policy, saliency[image].numpy(), asked, llava_spec.vision.grid, features[image])
        assert len(set(kept) & set(expected.tolist())) >= 0.9 * asked  # greedy rules may swap near ties
        theirs = by_hand(model, pixels[image], feature_layer, [(layer, kept)])
        torch.testing.assert_close(tokens[image, :asked], theirs, **EXACT)
        assert not tokens[image, asked:].any()
        assert (positions[image, asked:] == -1).all()


@pytest.mark.parametrize("method", [name for name, policy in POLICIES.items() if policy.in_tower and policy.reselects])
def test_several_cuts(method: str, checkpoint: Path, llava_spec: ModelSpec, pixels: Tensor, model: Any) -> None:
    feature_layer = llava_spec.vision.feature_layer
    module = vision_of(checkpoint, llava_spec, method, Cut(layer=0, keep=30), Cut(layer=feature_layer))
    first = vision_of(checkpoint, llava_spec, method, Cut(layer=0))
    budget, quota = 12, [12, 5, 1]
    tokens, positions, counts, saliency = run(module, pixels, budget, quota)
    _, alive, _, first_saliency = run(first, pixels, 30, [30] * IMAGES)
    assert torch.equal(saliency, first_saliency), "the saliency of the first cut, which sees all tokens"
    assert counts.tolist() == quota
    for image, asked in enumerate(quota):
        kept = positions[image, :asked].tolist()
        assert set(kept) <= set(alive[image].tolist())
        assert len(set(kept)) == asked
        theirs = by_hand(model, pixels[image], feature_layer, [(0, alive[image].tolist()), (feature_layer, kept)])
        torch.testing.assert_close(tokens[image, :asked], theirs, **EXACT)


def test_several_cuts_decide_again_by_the_later_layer(
    checkpoint: Path, llava_spec: ModelSpec, pixels: Tensor, model: Any
) -> None:
    """cls-topk: the tokens with the highest CLS attention at the last cut among those that the first one left."""
    feature_layer, keep, asked = llava_spec.vision.feature_layer, 30, 7
    module = vision_of(checkpoint, llava_spec, "cls-topk", Cut(layer=0, keep=keep), Cut(layer=feature_layer))
    positions = run(module, pixels, asked, [asked] * IMAGES)[1]
    first = run(vision_of(checkpoint, llava_spec, "cls-topk", Cut(layer=0)), pixels, keep, [keep] * IMAGES)[1]
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    for image in range(IMAGES):
        alive = first[image].tolist()
        with torch.no_grad():
            x = tower.pre_layrnorm(tower.embeddings(pixels[image][None]))
            x = module.vision_tower.layer(0)(x)[:, [0, *(place + 1 for place in alive)]]
            x = module.vision_tower.through(x, 1, feature_layer)
            layer = tower.encoder.layers[feature_layer]
            _, attention = layer.self_attn(layer.layer_norm1(x), attention_mask=None, output_attentions=True)
        row = attention.mean(1)[0, 0, 1:]
        expected = sorted(alive[index] for index in row.topk(asked).indices.tolist())
        assert positions[image].tolist() == expected


@pytest.mark.parametrize("budget", [40, 64])
def test_a_budget_above_a_cut_raises_what_it_keeps(
    budget: int, checkpoint: Path, llava_spec: ModelSpec, pixels: Tensor
) -> None:
    module = vision_of(checkpoint, llava_spec, "holov", Cut(layer=0, keep=30), Cut(layer=1))
    positions = run(module, pixels, budget, [budget] * IMAGES)[1]
    assert (positions >= 0).all()
    assert all(len(set(row.tolist())) == budget for row in positions)


@pytest.mark.parametrize("method", ["holov", "scope"])
def test_a_batch_is_its_singles_behind_a_cut(
    method: str, checkpoint: Path, llava_spec: ModelSpec, pixels: Tensor
) -> None:
    """Padding rows of a small quota must not be seen by the layers behind."""
    module = vision_of(checkpoint, llava_spec, method, Cut(layer=0))
    tokens, positions, _, _ = run(module, pixels, 20, [20, 3, 1])
    for image, asked in enumerate([20, 3, 1]):
        alone, where, _, _ = run(module, pixels[image : image + 1], asked, [asked])
        assert where[0].tolist() == positions[image, :asked].tolist()
        torch.testing.assert_close(tokens[image, :asked], alone[0], **EXACT)


@pytest.mark.parametrize("method", [name for name, policy in POLICIES.items() if policy.in_tower and policy.reselects])
@pytest.mark.parametrize(("budget", "quota"), [(40, [40, 5, 3]), (12, [12, 9, 1])])
def test_a_batch_is_its_singles_behind_several_cuts(
    method: str, budget: int, quota: list[int], checkpoint: Path, llava_spec: ModelSpec, pixels: Tensor
) -> None:
    """The first cut keeps 10, or what a picture's own quota asks for, whatever the others of the batch ask for."""
    feature_layer = llava_spec.vision.feature_layer
    module = vision_of(checkpoint, llava_spec, method, Cut(layer=0, keep=10), Cut(layer=feature_layer))
    tokens, positions, _, _ = run(module, pixels, budget, quota)
    for image, asked in enumerate(quota):
        alone, where, _, _ = run(module, pixels[image : image + 1], asked, [asked])
        assert where[0].tolist() == positions[image, :asked].tolist()
        torch.testing.assert_close(tokens[image, :asked], alone[0], **EXACT)


def test_row_index_finds_places() -> None:
    positions = torch.tensor([[5, 2, -1]])
    assert row_index(positions, None, 8, with_cls=False, keeps_cls=False).tolist() == [[6, 3, 1]]
    assert row_index(positions, None, 8, with_cls=True, keeps_cls=False).tolist() == [[0, 6, 3, 1]]
    places = torch.tensor([[1, 2, 5]])
    assert row_index(positions[:, :2], places, 8, with_cls=True, keeps_cls=False).tolist() == [[0, 3, 2]]
    assert row_index(torch.tensor([[8, 3]]), None, 8, with_cls=False, keeps_cls=True).tolist() == [[0, 4]]


def test_spread_is_exact() -> None:
    dice = np.random.default_rng(0)
    saliency = torch.from_numpy(dice.random((2, 3), dtype=np.float32))
    features = torch.from_numpy(dice.standard_normal((2, 3, 5)).astype(np.float32))
    places = torch.tensor([[0, 2, 7], [1, 3, 4]])
    whole, rows = spread(saliency, features, places, 8)
    assert rows is not None
    for image in range(2):
        assert torch.equal(whole[image, places[image]], saliency[image])
        assert torch.equal(rows[image, places[image]], features[image])
        gone = sorted(set(range(8)) - set(places[image].tolist()))
        assert (whole[image, gone] == -1).all()
        assert not rows[image, gone].any()


def test_the_mask_hides_padding_in_float16() -> None:
    mask = real_rows_mask(torch.tensor([[4, -1]]), torch.float16)
    scores = torch.full((1, 1, 1, 3), 50.0, dtype=torch.float16)
    share = torch.softmax((scores + mask).float(), -1)[0, 0, 0].tolist()
    assert share == [0.5, 0.5, 0.0]
