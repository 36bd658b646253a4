"""The packed CLIP tower against transformers' own LLaVA-NeXT and Video-LLaVA, on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_towers import Theirs, next_model, next_theirs, noisy_family, plan_of, video_theirs
from torch import Tensor

from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.onnx_from_graph import onnx_from_graph, save_vision
from holov_export.policies import POLICIES, FeatureSource, HolovPolicy, VisionzipPolicy
from holov_export.spec import ExportPlan, ModelSpec, Precision
from holov_export.vision.clip_packed import PackedClipVision
from holov_export.vision.families import Part, VisionModule, plain_from_plan, vision_from_plan
from holov_export.vision.loading import TORCH_DTYPES
from holov_export.vision.weights import SafetensorsReader

EXACT = {"rtol": 1e-5, "atol": 1e-5}
PACKING = [method for method, policy in POLICIES.items() if policy.packs]
METHODS = [*PACKING, "none"]
#: (height, width): rows of padding cut off, columns of it, none
PICTURES = [(30, 140), (112, 70), (60, 130)]

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A checkpoint, the part of it that is asked, and what transformers says."""

    folder: Path
    spec: ModelSpec
    part: Part
    theirs: Theirs

    def plan(self, method: str, precision: Precision = Precision.FP32) -> ExportPlan:
        return plan_of(self.spec, method, self.part, precision)

    def module(self, method: str, precision: Precision = Precision.FP32) -> PackedClipVision:
        with SafetensorsReader(self.folder) as reader:
            module = vision_from_plan(self.plan(method, precision), reader)
        assert isinstance(module, PackedClipVision)
        return module


@pytest.fixture(scope="module", params=["llava_next", "video_llava"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = noisy_family(tmp_path_factory.mktemp("packed") / "tiny", request.param)
    if request.param == "llava_next":
        return Case(folder, spec_from_checkpoint(folder, "tiny"), "image", next_theirs(folder, PICTURES))
    return Case(folder, spec_from_checkpoint(folder, "tiny"), "video", video_theirs(folder, [3, 8, 1]))


def run(module: VisionModule, inputs: Sequence[Tensor], budget: int, quota: Sequence[int]) -> Outputs:
    with torch.no_grad():
        out: Outputs = module(*inputs, torch.tensor([budget]), torch.tensor(quota))
    return out


def test_the_pictures_are_unequal(case: Case) -> None:
    counts = [len(tokens) for tokens in case.theirs.tokens]
    assert counts == ([16 + 24, 16 + 48, 16 + 32] if case.part == "image" else [3 * 17, 8 * 17, 17])
    assert max(counts) <= case.plan("holov").tokens
    spread = case.theirs.saliency[0]
    assert float(spread.max() / spread.mean()) > 2, "the tiny model's attention is too even to test with"


@pytest.mark.parametrize("method", [*(name for name in PACKING if POLICIES[name].lossless_at_full), "none"])
def test_full_budget_is_transformers_own(method: str, case: Case) -> None:
    inputs = case.theirs.inputs()
    longest = inputs[1].shape[1]
    tokens, positions, counts, _ = run(case.module(method), inputs, longest, [longest] * 3)
    for picture, expected in enumerate(case.theirs.tokens):
        own = len(expected)
        assert int(counts[picture]) == own
        torch.testing.assert_close(tokens[picture, :own], expected, **EXACT)
        assert positions[picture].tolist() == [*range(own), *[-1] * (longest - own)]
        assert not tokens[picture, own:].any()


def test_newlines_behind_rows_make_it_get_image_features(tmp_path: Path) -> None:
    """What the host does with the whole of LLaVA-NeXT's rows: a newline behind each row of the mosaic."""
    folder, sizes = noisy_family(tmp_path / "tiny", "llava_next"), PICTURES[:2]
    theirs, model = next_theirs(folder, sizes), next_model(folder)
    plan, inputs = plan_of(spec_from_checkpoint(folder, "tiny"), "holov"), theirs.inputs()
    with SafetensorsReader(folder) as reader:
        tokens, _, counts, _ = run(vision_from_plan(plan, reader), inputs, inputs[1].shape[1], [999, 999])
    side, base = plan.model.clip.image_size, plan.model.clip.tokens
    padded = torch.nn.utils.rnn.pad_sequence(torch.split(theirs.pixels, theirs.views), batch_first=True)
    with torch.no_grad():
        expected = model.get_image_features(padded.reshape(2, -1, 3, side, side), torch.tensor(sizes)).pooler_output
    newline = model.model.image_newline.detach()
    for picture, features in enumerate(expected):
        rows = len(features) - int(counts[picture])
        mosaic = tokens[picture, base : int(counts[picture])].reshape(rows, -1, plan.model.decoder.width)
        with_newlines = torch.cat([mosaic, newline.expand(rows, 1, -1)], dim=1).flatten(0, 1)
        torch.testing.assert_close(torch.cat([tokens[picture, :base], with_newlines]), features, **EXACT)


def test_saliency_is_the_eager_cls_row(case: Case) -> None:
    saliency = run(case.module("holov"), case.theirs.inputs(), 8, [8] * 3)[3]
    assert saliency.dtype == torch.float32
    for picture, expected in enumerate(case.theirs.saliency):
        torch.testing.assert_close(saliency[picture, : len(expected)], expected, rtol=1e-5, atol=1e-7)
        assert (saliency[picture, len(expected) :] == -1.0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("budget", "quota"), [(16, [16, 16, 16]), (40, [40, 7, 1]), (1, [1, 1, 1])])
def test_kept_rows_are_the_gathered_rows(method: str, budget: int, quota: list[int], case: Case) -> None:
    tokens, positions, counts, _ = run(case.module(method), case.theirs.inputs(), budget, quota)
    assert tokens.shape == (3, budget, case.spec.decoder.width)
    for picture, asked in enumerate(quota):
        theirs = case.theirs.tokens[picture]
        count = min(asked, len(theirs))
        place = positions[picture]
        real = place >= 0
        assert int(counts[picture]) == count
        assert not real[count:].any()
        if case.plan(method).policy.lossless_at_full:
            assert len(set(place[:count].tolist())) == int(real.sum()) == count
        torch.testing.assert_close(tokens[picture][real], theirs[place[real]], **EXACT)
        assert not tokens[picture][~real].any(), "rows without a token are exactly zero"


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_unequal_pictures_is_its_singles(method: str, case: Case) -> None:
    module, quota = case.module(method), [20, 11, 14]
    together = run(module, case.theirs.inputs(), 20, quota)
    whole = case.theirs.inputs()[2]
    for picture, asked in enumerate(quota):
        own = len(case.theirs.tokens[picture])
        pixels, source, _ = case.theirs.inputs(picture)
        alone = run(module, (pixels, source, whole[picture : picture + 1, :own]), asked, [asked])
        count = int(alone[2][0])
        assert int(together[2][picture]) == count == min(asked, own)
        assert together[1][picture, :count].tolist() == alone[1][0, :count].tolist()
        torch.testing.assert_close(together[0][picture, :count], alone[0][0, :count], **EXACT)
        torch.testing.assert_close(together[3][picture, :own], alone[3][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["holov", "scope", "divprune"])
def test_features_are_those_of_each_token(method: str, case: Case) -> None:
    inputs, module = case.theirs.inputs(), case.module(method)
    with torch.no_grad():
        features = module.features_of(*inputs)
        if module.features is not FeatureSource.PROJECTED:
            projected = module.multi_modal_projector(features)
        else:
            projected = features
    assert features.dtype == torch.float32
    for picture, expected in enumerate(case.theirs.tokens):
        torch.testing.assert_close(projected[picture, : len(expected)], expected, **EXACT)
        assert not features[picture, len(expected) :].any()


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("method", ["holov", "scope", "divprune"])
def test_half_precision_decides_in_float32(method: str, precision: Precision, case: Case) -> None:
    dtype, module = TORCH_DTYPES[precision], case.module(method, precision)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()} <= {torch.float32}
    pixels, source, crops = case.theirs.inputs()
    longest = source.shape[1]
    seen: list[torch.dtype] = []
    module.selection.register_forward_pre_hook(
        lambda _, inputs: seen.extend(value.dtype for value in inputs[:2] if value is not None)
    )
    tokens, _, _, saliency = run(module, (pixels.to(dtype), source, crops), longest, [longest] * 3)
    assert set(seen) == {torch.float32}
    assert tokens.dtype == dtype
    assert saliency.dtype == torch.float32
    coarse = 0.02 if precision is Precision.FP16 else 0.1
    for picture, expected in enumerate(case.theirs.tokens):
        error = float((tokens[picture, : len(expected)].float() - expected).abs().max())
        assert error < coarse * float(expected.abs().max())


def test_only_what_is_kept_is_computed(case: Case) -> None:
    """Select early: the second half of the feature layer and the projector see K rows of each picture."""
    seen: list[tuple[int, ...]] = []
    module = case.module("holov")
    for part in (module.vision_tower.feature_layer.mlp, module.multi_modal_projector):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    run(module, case.theirs.inputs(), 9, [9] * 3)
    assert seen == [(3, 9, case.spec.clip.width)] * 2


def test_plain_is_the_encoder_without_selection(case: Case) -> None:
    with SafetensorsReader(case.folder) as reader:
        plain = plain_from_plan(case.plan("scope"), reader)
    tokens, positions, _, _ = run(plain, case.theirs.inputs(), 12, [12] * 3)
    for picture, expected in enumerate(case.theirs.tokens):
        assert positions[picture].tolist() == list(range(12))
        torch.testing.assert_close(tokens[picture], expected[:12], **EXACT)


def test_rules_that_need_equal_pictures_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="visionzip"):
        PackedClipVision(case.spec, VisionzipPolicy(), case.part)


def test_the_cls_tokens_of_pictures_stay_in_the_tower(case: Case) -> None:
    assert PackedClipVision(case.spec, HolovPolicy(), "image").with_cls is False
    assert case.module("holov").with_cls is (case.part == "video")


@pytest.mark.parametrize(
    "method",
    [
        "holov",
        "scope",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("holov-official", "divprune", "none")),
    ],
)
def test_the_graph_is_the_module_at_other_sizes(method: str, case: Case, tmp_path: Path) -> None:
    plan, module = case.plan(method), case.module(method)
    model = onnx_from_graph(module, plan)
    assert not {"NonZero", "If"} & {node.op_type for node in model.graph.all_nodes()}
    session = onnxruntime.InferenceSession(save_vision(model, tmp_path), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in plan.signature[0]]
    for pictures, budget, quota in (
        ((0, 1, 2), 21, [21, 9, 30]),
        ((2,), 5, [5]),
        ((1,), 999, [999]),
        ((0, 2), 1, [1, 1]),
    ):
        inputs = (*case.theirs.inputs(*pictures), torch.tensor([budget]), torch.tensor(quota))
        with torch.no_grad():
            expected = module(*inputs)
        values = [value.numpy() for value in inputs]
        found = session.run(None, dict(zip(names, values, strict=True)))
        np.testing.assert_array_equal(found[1], expected[1].numpy())
        np.testing.assert_array_equal(found[2], expected[2].numpy())
        np.testing.assert_allclose(found[0], expected[0].numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[3], expected[3].numpy(), rtol=1e-4, atol=1e-6)
