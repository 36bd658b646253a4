"""Our tower, projector and early selection against transformers' own LLaVA, on a tiny random checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TinyLlava, write_checkpoint
from noisy import noisy_copy
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

from holov_export.errors import CheckpointError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.policies import POLICIES, FeatureSource, HolovPolicy, policy_from_settings
from holov_export.selection.reference import merged_of, positions_of
from holov_export.spec import ModelSpec, Precision
from holov_export.vision.clip import LlavaVision, checkpoint_names, vision_from_checkpoint
from holov_export.vision.clip_layers import activation, take_rows
from holov_export.vision.loading import TORCH_DTYPES
from holov_export.vision.weights import SafetensorsReader

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def checkpoint(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy_copy(llava_checkpoint, tmp_path_factory.mktemp("vision") / "noisy")


@dataclass(frozen=True)
class Theirs:
    """What transformers says of some pictures: tokens [B, N, D], the feature layer's CLS row, pixels."""

    pixels: Tensor
    tokens: Tensor
    saliency: Tensor


def vision_of(folder: Path, spec: ModelSpec, method: str, precision: Precision = Precision.FP32) -> LlavaVision:
    with SafetensorsReader(folder) as reader:
        return vision_from_checkpoint(spec, policy_from_settings(method), reader, precision)


def run(
    module: LlavaVision, pixels: Tensor, budget: int, quota: Iterable[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        out: tuple[Tensor, Tensor, Tensor, Tensor] = module(pixels, torch.tensor([budget]), torch.tensor(list(quota)))
    return out


def theirs_from(folder: Path, pixels: Tensor, feature_layer: int) -> Theirs:
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tower: Any = model.eval().model.vision_tower
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
        features: Any = model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        tokens = features if isinstance(features, Tensor) else torch.stack(list(features))
        by_hand = model.model.multi_modal_projector(out.hidden_states[feature_layer + 1][:, 1:])
    torch.testing.assert_close(tokens.reshape(by_hand.shape), by_hand)
    saliency = out.attentions[feature_layer][:, :, 0, 1:].mean(1)
    return Theirs(pixels, by_hand, saliency)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, llava_spec: ModelSpec) -> Theirs:
    side = llava_spec.vision.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    return theirs_from(checkpoint, pixels, llava_spec.vision.feature_layer)


def test_saliency_is_the_eager_cls_row(checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs) -> None:
    saliency = run(vision_of(checkpoint, llava_spec, "holov"), theirs.pixels, 8, [8] * 3)[3]
    assert saliency.dtype == torch.float32
    torch.testing.assert_close(saliency, theirs.saliency, rtol=1e-5, atol=1e-7)
    assert float(saliency.max() / saliency.mean()) > 2, "the tiny model's attention is too even to test with"


@pytest.mark.parametrize("method", [method for method, policy in POLICIES.items() if policy.lossless_at_full])
def test_full_budget_is_transformers_own(method: str, checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs) -> None:
    n = llava_spec.vision.tokens
    tokens, positions, counts, _ = run(vision_of(checkpoint, llava_spec, method), theirs.pixels, n, [n] * 3)
    torch.testing.assert_close(tokens, theirs.tokens, **EXACT)
    assert positions.tolist() == [list(range(n))] * 3
    assert counts.tolist() == [n] * 3


@pytest.mark.parametrize("method", [method for method, policy in POLICIES.items() if not policy.merges])
@pytest.mark.parametrize(("budget", "quota"), [(16, [16, 16, 16]), (20, [20, 7, 1]), (1, [1, 1, 1]), (63, [40, 63, 2])])
def test_kept_rows_are_the_gathered_rows(
    method: str, budget: int, quota: list[int], checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs
) -> None:
    module = vision_of(checkpoint, llava_spec, method)
    tokens, positions, counts, saliency = run(module, theirs.pixels, budget, quota)
    assert tokens.shape == (3, budget, llava_spec.decoder.width)
    assert counts.tolist() == quota
    for image, asked in enumerate(quota):
        place = positions[image]
        real = place >= 0
        torch.testing.assert_close(tokens[image][real], theirs.tokens[image][place[real]], **EXACT)
        assert not tokens[image][~real].any(), "rows without a token are exactly zero"
        assert not real[asked:].any()
        if module.features is FeatureSource.NONE:
            policy = policy_from_settings(method)
            expected = positions_of(policy, saliency[image].numpy(), asked, llava_spec.vision.grid)
            assert place[:asked].tolist() == expected.tolist()


@pytest.mark.parametrize(("budget", "quota"), [(16, [16, 16, 16]), (20, [20, 7, 1]), (63, [40, 63, 2]), (64, [64] * 3)])
def test_visionzip_merges_transformers_rows(
    budget: int, quota: list[int], checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs
) -> None:
    """CLS, dominant and contextual rows, from transformers' own hidden states and keys, put together by plain loops."""
    policy, layer = policy_from_settings("visionzip"), llava_spec.vision.feature_layer
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    tower: Any = model.eval().model.vision_tower
    inner = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        states = tower(theirs.pixels, output_hidden_states=True).hidden_states
        block = inner.encoder.layers[layer]
        heads = block.self_attn.k_proj(block.layer_norm1(states[layer])).unflatten(-1, (llava_spec.vision.heads, -1))
        keys = heads.mean(2)[:, 1:]
    tokens, positions, counts, _ = run(vision_of(checkpoint, llava_spec, "visionzip"), theirs.pixels, budget, quota)
    assert counts.tolist() == quota
    joining = 0
    for image, asked in enumerate(quota):
        saliency, features = theirs.saliency[image].numpy(), keys[image].numpy()
        kept = positions_of(policy, saliency, asked, llava_spec.vision.grid, features)
        merged = merged_of(policy, saliency, asked, features)
        assert positions[image, :asked].tolist() == kept.tolist()
        assert kept[0] == llava_spec.vision.tokens, "CLS comes first"
        hidden = states[layer + 1][image]
        rows = []
        for place in kept.tolist():
            row = hidden[0] if place == llava_spec.vision.tokens else hidden[place + 1]
            joined = [hidden[1 + token] for token in range(len(merged)) if merged[token] == place]
            joining += len(joined)
            rows.append(row + torch.stack(joined).mean(0) if joined else row)
        with torch.no_grad():
            expected = model.model.multi_modal_projector(torch.stack(rows))
        torch.testing.assert_close(tokens[image, :asked], expected, **EXACT)
        assert not tokens[image, asked:].any()
    assert joining > 0, "nothing was merged"


def test_paper_rule_reads_the_projected_features(checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs) -> None:
    policy, grid = policy_from_settings("holov-paper"), llava_spec.vision.grid
    out = run(vision_of(checkpoint, llava_spec, "holov-paper"), theirs.pixels, 16, [16] * 3)
    for image in range(3):
        features = theirs.tokens[image].numpy()
        expected = positions_of(policy, theirs.saliency[image].numpy(), 16, grid, features)
        assert out[1][image].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("budget", "quota", "size", "count"),
    [(0, 5, 1, 1), (-3, 5, 1, 1), (65, 65, 64, 64), (10**9, 10**9, 64, 64), (8, 0, 8, 1), (8, -4, 8, 1), (8, 99, 8, 8)],
)
def test_budget_and_quota_are_clamped(
    budget: int, quota: int, size: int, count: int, checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs
) -> None:
    module = vision_of(checkpoint, llava_spec, "holov")
    tokens, positions, counts, _ = run(module, theirs.pixels, budget, [quota] * 3)
    assert tokens.shape[1] == positions.shape[1] == size
    assert counts.tolist() == [count] * 3
    assert ((positions >= 0).sum(1) == count).all()


@pytest.mark.parametrize("layer", [-1, -3, 1])
def test_other_feature_layers(layer: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "other", TinyLlava(feature_layer=layer, layers=1))
    spec = spec_from_checkpoint(folder, "other")
    theirs = theirs_from(folder, torch.randn(2, 3, 56, 56), spec.vision.feature_layer)
    module = vision_of(folder, spec, "holov")
    assert len(module.vision_tower.layers) == spec.vision.feature_layer + 1
    tokens, _, _, saliency = run(module, theirs.pixels, 64, [64, 64])
    torch.testing.assert_close(tokens, theirs.tokens, **EXACT)
    torch.testing.assert_close(saliency, theirs.saliency, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_activations_are_transformers_own(hidden_act: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 500)
    torch.testing.assert_close(activation(hidden_act, x), ACT2FN[hidden_act](x))


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_half_precision_decides_in_float32(
    precision: Precision, checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs
) -> None:
    dtype = TORCH_DTYPES[precision]
    module = vision_of(checkpoint, llava_spec, "holov", precision)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()} == {torch.float32}
    tokens, _, _, saliency = run(module, theirs.pixels.to(dtype), 64, [64] * 3)
    assert tokens.dtype == dtype
    assert saliency.dtype == torch.float32
    coarse = 0.01 if precision is Precision.FP16 else 0.08
    assert float((tokens.float() - theirs.tokens).abs().max()) < coarse * float(theirs.tokens.abs().max())


def test_rows_are_taken_from_their_own_picture() -> None:
    rows = torch.arange(24.0).reshape(3, 4, 2)
    index = torch.tensor([[3, 0], [1, 1], [2, 0]])
    expected = torch.stack([rows[image][index[image]] for image in range(3)])
    assert torch.equal(take_rows(rows, index), expected)


def test_only_what_is_kept_is_computed(checkpoint: Path, llava_spec: ModelSpec, theirs: Theirs) -> None:
    """Select early: the feature layer's MLP and the projector see K rows, not N."""
    module = vision_of(checkpoint, llava_spec, "holov")
    seen: list[tuple[int, ...]] = []
    for part in (module.vision_tower.feature_layer.mlp, module.multi_modal_projector):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    run(module, theirs.pixels, 9, [9] * 3)
    assert seen == [(3, 9, llava_spec.vision.width)] * 2


NEW = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
OLD = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        ("vision_tower.layers.0.self_attn.q_proj.weight", OLD),
        ("vision_tower.layers.0.self_attn.q_proj.weight", NEW),
        ("vision_tower.layers.0.self_attn.q_proj.weight", "model.vision_tower.vision_model" + OLD[25:]),
        ("vision_tower.embeddings.position_embedding", OLD[:25] + ".embeddings.position_embedding.weight"),
        ("vision_tower.embeddings.class_embedding", "vision_tower.embeddings.class_embedding"),
        ("vision_tower.pre_layernorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("multi_modal_projector.linear_2.bias", "multi_modal_projector.linear_2.bias"),
        ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
    ],
)
def test_old_and_new_spellings(ours: str, published: str) -> None:
    assert published in checkpoint_names(ours)


@pytest.mark.parametrize("front", ["", "model."])
@pytest.mark.parametrize("inner", ["", "vision_model."])
def test_every_parameter_is_found_in_every_spelling(front: str, inner: str, llava_spec: ModelSpec) -> None:
    vision = llava_spec.vision
    config = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    bare = [name.removeprefix("vision_model.") for name, _ in CLIPVisionModel(config).named_parameters()]
    published = {f"{front}vision_tower.{inner}{name}" for name in bare}
    published |= {f"{front}multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    for name, _ in LlavaVision(llava_spec, HolovPolicy()).named_parameters():
        assert len(published & set(checkpoint_names(name))) == 1, name


@dataclass
class Altered:
    """A reader that changes one tensor."""

    reader: SafetensorsReader
    name: str

    def read(self, names: list[str]) -> Tensor:
        tensor = self.reader.read(names)
        return tensor[..., :-1] if any(self.name in name for name in names) else tensor


@pytest.mark.parametrize("name", ["class_embedding", "layers.1.mlp.fc1.weight", "linear_2.bias"])
def test_another_shape_is_refused(name: str, checkpoint: Path, llava_spec: ModelSpec) -> None:
    with SafetensorsReader(checkpoint) as reader:
        altered: Any = Altered(reader, name)
        with pytest.raises(CheckpointError, match=rf"{name.split('.')[-2] if '.' in name else name}.*config.json says"):
            vision_from_checkpoint(llava_spec, HolovPolicy(), altered, Precision.FP32)


def test_another_size_in_the_config_is_refused(checkpoint: Path, llava_spec: ModelSpec) -> None:
    vision = llava_spec.vision.model_copy(update={"mlp_width": llava_spec.vision.mlp_width + 16})
    spec = llava_spec.model_copy(update={"vision": vision})
    with SafetensorsReader(checkpoint) as reader, pytest.raises(CheckpointError, match=r"config\.json says"):
        vision_from_checkpoint(spec, HolovPolicy(), reader, Precision.FP32)


def test_more_layers_than_the_checkpoint_has(checkpoint: Path, llava_spec: ModelSpec) -> None:
    vision = llava_spec.vision.model_copy(update={"layers": 9, "feature_layer": 7})
    spec = llava_spec.model_copy(update={"vision": vision})
    with SafetensorsReader(checkpoint) as reader, pytest.raises(CheckpointError, match="has no tensor"):
        vision_from_checkpoint(spec, HolovPolicy(), reader, Precision.FP32)
