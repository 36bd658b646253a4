"""Qwen2.5-VL's tower against transformers' own, in torch and as an ONNX graph, on tiny random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export.graphs import shape_values, sources_of
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from holov_export.compile.readiness import readiness_of
from holov_export.export.onnx_from_graph import onnx_from_graph, save_vision
from holov_export.policies import POLICIES, FeatureSource, NoSelection, SelectionPolicy, policy_from_settings
from holov_export.selection.geometry import crops_of_official_qwen
from holov_export.selection.reference import official_qwen_positions
from holov_export.spec import (
    CheckpointSource,
    DecoderSpec,
    ExportPlan,
    ModelSpec,
    PatchImageSpec,
    Precision,
    PromptSpec,
    QwenVisionSpec,
)
from holov_export.vision.loading import TORCH_DTYPES
from holov_export.vision.qwen2_5_vl import QwenVision, checkpoint_names, shaped
from holov_export.vision.qwen_layers import BLOCK, attend_and_receive

EXACT = {"rtol": 1e-5, "atol": 1e-5}
PACKING = [method for method, policy in POLICIES.items() if policy.packs]
METHODS = [*PACKING, "none"]
UNIT = 4
#: (frames, rows, columns) of patches; windows are 6 x 6 patches. The borders of the first two are no whole windows.
WIDE, TALL, CLIP, ONE, WHOLE = (1, 10, 14), (1, 16, 8), (2, 8, 10), (1, 2, 2), (1, 12, 6)
GRIDS = {
    "wide": [WIDE],
    "one-unit": [ONE],
    "whole-windows": [WHOLE],
    "two-pictures": [WIDE, TALL],
    "picture-and-clip": [TALL, CLIP, ONE],
    "more-patches-than-a-block": [(1, 18, 22), ONE],
}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Tiny:
    """The spec of a tiny tower, and transformers' tower with its weights."""

    spec: ModelSpec
    theirs: Any

    def plan(self, method: str, precision: Precision = Precision.FP32) -> ExportPlan:
        return ExportPlan(
            model=self.spec,
            source=CheckpointSource(kind="local", name="tiny"),
            policy=_policy(method),
            precision=precision,
            decoder=None,
        )

    def module(self, method: str, precision: Precision = Precision.FP32) -> QwenVision:
        module = QwenVision(self.spec, _policy(method)).eval().requires_grad_(False)
        stored = {f"visual.{name}": tensor for name, tensor in self.theirs.state_dict().items()}
        dtype = TORCH_DTYPES[precision]
        own = {name: shaped(name, stored[name]).to(dtype) for name, _ in module.named_parameters()}
        assert len(own) == len(stored)
        module.load_state_dict(own, assign=True, strict=True)
        return module


@dataclass(frozen=True)
class Inputs:
    """What the graph is fed with for some pictures and clips, and which of transformers' rows each token is."""

    patches: Tensor
    grids: list[Grid]
    pixels: Tensor
    tables: tuple[Tensor, ...]
    source: Tensor
    crops: Tensor

    @property
    def before_budget(self) -> tuple[Tensor, ...]:
        return (self.pixels, *self.tables, self.source, self.crops)

    @property
    def counts(self) -> list[int]:
        return [t * h * w // UNIT for t, h, w in self.grids]

    @property
    def grid_thw(self) -> Tensor:
        return torch.tensor(self.grids)


def _policy(method: str) -> SelectionPolicy:
    return NoSelection() if method == "none" else policy_from_settings(method)


def _table(sizes: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """([groups, width] members, -1 for filling; [sum of sizes] each member's place), member after member."""
    rows, slots, member = torch.full((len(sizes), width), -1), [], 0
    for group, size in enumerate(sizes):
        for column in range(size):
            rows[group, column] = member
            slots.append(group * width + column)
            member += 1
    return rows, torch.tensor(slots)


def inputs_of(spec: QwenVisionSpec, grids: list[Grid], strips: int = 16, quota: int | None = None) -> Inputs:
    """Random patches of pictures and clips, as transformers gets them and as the graph does.

    Args:
        strips: crops of each picture; with `quota`, those of `holov-official` for it.
    """
    thw = torch.tensor(grids)
    count = int(thw.prod(1).sum())
    patches = torch.randn(count, spec.patch_values, generator=torch.Generator().manual_seed(count))
    order, ends = get_vision_window_index(thw, spec.merge, spec.window_size, spec.patch_size)
    by_patch = (order[:, None] * UNIT + torch.arange(UNIT)).flatten()
    windows = _table([int(size) for size in ends.diff()], spec.window_patches)
    frames = [h * w for t, h, w in grids for _ in range(t)]
    views = _table(frames, max(frames))
    row_of_unit = torch.argsort(order)
    tokens = [t * h * w // UNIT for t, h, w in grids]
    source, crops = (torch.full((len(grids), max(tokens)), -1) for _ in range(2))
    first = 0
    for picture, own in enumerate(tokens):
        source[picture, :own] = row_of_unit[first : first + own]
        official = None if quota is None else crops_of_official_qwen(own, max(min(quota, own) - 1, 1))
        parts = np.arange(own) * strips // own if official is None else official
        crops[picture, :own] = torch.from_numpy(parts)
        first += own
    places = get_vision_position_ids(thw, spec.merge)[by_patch]
    return Inputs(patches, grids, patches[by_patch], (places, *windows, *views), source, crops)


def _vision(tower: Any) -> QwenVisionSpec:
    config = tower.config
    return QwenVisionSpec(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge=config.spatial_merge_size,
        window_size=config.window_size,
        width=config.hidden_size,
        layers=config.depth,
        heads=config.num_heads,
        mlp_width=config.intermediate_size,
        activation=config.hidden_act,
        full_layers=tuple(config.fullatt_block_indexes),
        norm_eps=1e-6,
        theta=config.rope_parameters["rope_theta"],
    )


def _spec(tower: Any) -> ModelSpec:
    """A model around the tower; the language model is a made-up one."""
    config = tower.config
    decoder = DecoderSpec(
        architecture="qwen2_5_vl",
        width=config.out_hidden_size,
        layers=1,
        heads=2,
        kv_heads=1,
        head_width=24,
        mlp_width=72,
        vocab_size=500,
        context=2048,
        image_token_id=3,
        bos_token_id=None,
        eos_token_ids=(2,),
        pad_token_id=None,
    )
    image = PatchImageSpec(
        patch_size=config.patch_size,
        merge=2,
        temporal=2,
        min_pixels=64,
        max_pixels=64 * 300,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    prompt = PromptSpec(chat_template="")
    return ModelSpec(
        family="qwen2_5_vl", name="tiny", image=image, vision=_vision(tower), decoder=decoder, prompt=prompt
    )


def make_tiny(activation: str = "silu") -> Tiny:
    config = Qwen2_5_VLVisionConfig(
        depth=4,
        hidden_size=80,
        hidden_act=activation,
        intermediate_size=104,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=24,
        out_hidden_size=48,
        fullatt_block_indexes=[1, 3],
        attn_implementation="eager",
    )
    torch.manual_seed(7)
    tower: Any = Qwen2_5_VisionTransformerPretrainedModel(config).eval().requires_grad_(False)
    for parameter in tower.parameters():  # no two weights alike, and attention that is not even
        parameter.add_(torch.randn(parameter.shape) * 0.04)
    for block in tower.blocks:
        block.attn.qkv.weight.mul_(4)
    return Tiny(_spec(tower), tower)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return make_tiny()


@pytest.fixture(params=list(GRIDS))
def inputs(request: pytest.FixtureRequest, tiny: Tiny) -> Inputs:
    return inputs_of(_vision(tiny.theirs), GRIDS[request.param])


def run(module: QwenVision, inputs: Inputs, budget: int, quota: Sequence[int]) -> Outputs:
    with torch.no_grad():
        out: Outputs = module(*inputs.before_budget, torch.tensor([budget]), torch.tensor(quota))
    return out


def merged_by_transformers(tiny: Tiny, inputs: Inputs) -> list[Tensor]:
    """[its tokens, D] of each picture, in raster order."""
    rows = tiny.theirs(inputs.patches, grid_thw=inputs.grid_thw).pooler_output
    return list(torch.split(rows, inputs.counts))


def saliency_by_transformers(tiny: Tiny, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What eager attention of the last block says, [its tokens] of each picture, in raster order."""
    seen: list[tuple[object, Tensor]] = []
    eager = modeling_qwen2_5_vl.eager_attention_forward

    def recording(module: object, *args: Any, **named: Any) -> Any:
        out = eager(module, *args, **named)
        seen.append((module, out[1]))
        return out

    monkeypatch.setattr(modeling_qwen2_5_vl, "eager_attention_forward", recording)
    tiny.theirs(inputs.patches, grid_thw=inputs.grid_thw)
    last = [weights for module, weights in seen if module is tiny.theirs.blocks[-1].attn]
    assert len(last) == sum(t for t, _, _ in inputs.grids), "one map for each view"
    by_window = torch.cat([weights[0].mean(0).mean(0) for weights in last]).reshape(-1, UNIT).mean(-1)
    spec = _vision(tiny.theirs)
    order, _ = get_vision_window_index(inputs.grid_thw, spec.merge, spec.window_size, spec.patch_size)
    return list(torch.split(by_window[torch.argsort(order)], inputs.counts))


def test_windows_are_unequal_and_attention_is_not_even(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(_vision(tiny.theirs), GRIDS["two-pictures"])
    sizes = Counter((inputs.tables[1] >= 0).sum(-1).tolist())
    assert len(sizes) > 3
    for saliency in saliency_by_transformers(tiny, inputs, monkeypatch):
        assert float(saliency.max() / saliency.mean()) > 1.5
    assert (inputs.source[0] != torch.arange(inputs.source.shape[1])).any(), "windows change the order of tokens"
    assert max(GRIDS["more-patches-than-a-block"][0][1:]) ** 2 > BLOCK


@pytest.mark.parametrize("method", [*(name for name in PACKING if POLICIES[name].lossless_at_full), "none"])
def test_full_budget_is_transformers_own(method: str, tiny: Tiny, inputs: Inputs) -> None:
    longest = max(inputs.counts)
    tokens, positions, counts, _ = run(tiny.module(method), inputs, longest, [longest] * len(inputs.grids))
    assert counts.tolist() == inputs.counts
    for picture, expected in enumerate(merged_by_transformers(tiny, inputs)):
        own = len(expected)
        torch.testing.assert_close(tokens[picture, :own], expected, **EXACT)
        assert positions[picture].tolist() == [*range(own), *[-1] * (longest - own)]
        assert not tokens[picture, own:].any()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_other_activations(activation: str) -> None:
    tiny = make_tiny(activation)
    inputs = inputs_of(_vision(tiny.theirs), [WIDE])
    tokens = run(tiny.module("holov"), inputs, inputs.counts[0], inputs.counts)[0]
    torch.testing.assert_close(tokens[0], merged_by_transformers(tiny, inputs)[0], **EXACT)


def test_saliency_is_the_attention_that_eager_maps_say(
    tiny: Tiny, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    saliency = run(tiny.module("holov"), inputs, 1, [1] * len(inputs.grids))[3]
    assert saliency.dtype == torch.float32
    for picture, expected in enumerate(saliency_by_transformers(tiny, inputs, monkeypatch)):
        torch.testing.assert_close(saliency[picture, : len(expected)], expected, rtol=1e-5, atol=1e-7)
        assert (saliency[picture, len(expected) :] == -1.0).all()


def test_received_attention_of_a_view_sums_to_one(tiny: Tiny) -> None:
    inputs = inputs_of(_vision(tiny.theirs), [WIDE, TALL])
    saliency = run(tiny.module("cls-topk"), inputs, 1, [1, 1])[3]
    for picture, own in enumerate(inputs.counts):
        assert float(saliency[picture, :own].sum()) * UNIT == pytest.approx(1.0, abs=1e-5)


def test_the_plain_encoder_has_no_saliency(tiny: Tiny) -> None:
    inputs = inputs_of(_vision(tiny.theirs), [WIDE, ONE])
    saliency = run(tiny.module("none"), inputs, 3, [3, 3])[3]
    assert not saliency[inputs.source >= 0].any()
    assert (saliency[inputs.source < 0] == -1.0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("budget", "quota"), [(9, [9, 9, 9]), (30, [30, 7, 1]), (1, [1, 1, 1])])
def test_kept_rows_are_the_gathered_rows(method: str, budget: int, quota: list[int], tiny: Tiny) -> None:
    official = method == "holov-official"
    inputs = inputs_of(_vision(tiny.theirs), GRIDS["picture-and-clip"], quota=budget if official else None)
    tokens, positions, counts, _ = run(tiny.module(method), inputs, budget, quota)
    assert tokens.shape == (3, budget, tiny.spec.decoder.width)
    for picture, (asked, theirs) in enumerate(zip(quota, merged_by_transformers(tiny, inputs), strict=True)):
        count, place = min(asked, len(theirs)), positions[picture]
        real = (place >= 0) & (place < len(theirs))
        assert int(counts[picture]) == count
        assert (place[count:] == -1).all()
        if not official:
            assert len(set(place[:count].tolist())) == int(real.sum()) == count
        torch.testing.assert_close(tokens[picture][real], theirs[place[real]], **EXACT)
        assert not tokens[picture][~real].any(), "rows without a token are exactly zero"


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_unequal_pictures_is_its_singles(method: str, tiny: Tiny) -> None:
    spec, module, quota = _vision(tiny.theirs), tiny.module(method), [20, 11, 1]
    grids = GRIDS["picture-and-clip"]
    together_inputs = inputs_of(spec, grids)
    together = run(module, together_inputs, 20, quota)
    first = 0
    for picture, grid in enumerate(grids):
        count = int(np.prod(grid))
        alone_inputs = _with_patches(spec, grid, together_inputs.patches[first : first + count])
        first += count
        alone = run(module, alone_inputs, quota[picture], [quota[picture]])
        kept = int(alone[2][0])
        own = alone_inputs.counts[0]
        assert int(together[2][picture]) == kept == min(quota[picture], own)
        assert together[1][picture, :kept].tolist() == alone[1][0, :kept].tolist()
        torch.testing.assert_close(together[0][picture, :kept], alone[0][0, :kept], **EXACT)
        torch.testing.assert_close(together[3][picture, :own], alone[3][0], rtol=1e-5, atol=1e-7)


def _with_patches(spec: QwenVisionSpec, grid: Grid, patches: Tensor) -> Inputs:
    """The inputs of one picture with these patches, in transformers' order."""
    made = inputs_of(spec, [grid])
    order, _ = get_vision_window_index(torch.tensor([grid]), spec.merge, spec.window_size, spec.patch_size)
    pixels = patches[(order[:, None] * UNIT + torch.arange(UNIT)).flatten()]
    return Inputs(patches, [grid], pixels, made.tables, made.source, made.crops)


@pytest.mark.parametrize("method", ["holov", "scope", "divprune", "none"])
def test_features_are_the_mergers_rows(method: str, tiny: Tiny) -> None:
    inputs = inputs_of(_vision(tiny.theirs), [ONE, WIDE])
    with torch.no_grad():
        features = tiny.module(method).features_of(*inputs.before_budget)
    assert features.dtype == torch.float32
    for picture, expected in enumerate(merged_by_transformers(tiny, inputs)):
        torch.testing.assert_close(features[picture, : len(expected)], expected, **EXACT)
        assert not features[picture, len(expected) :].any()


def test_rules_without_features_run_the_merger_for_kept_tokens_only(tiny: Tiny) -> None:
    inputs = inputs_of(_vision(tiny.theirs), [WIDE])
    for method in ("holov", "scope", "none"):
        module, rows = tiny.module(method), []
        module.visual.merger.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
        run(module, inputs, 5, [5])
        early = method != "none" and POLICIES[method].features is FeatureSource.NONE
        assert rows == [5 * UNIT if early else inputs.counts[0] * UNIT]


def test_attend_and_receive_is_plain_attention() -> None:
    dice = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, BLOCK + 5, 8, generator=dice) for _ in range(3))
    mask = torch.zeros(2, BLOCK + 5)
    mask[1, 9:] = -30000.0
    shares = torch.rand(2, BLOCK + 5, generator=dice)
    attention = (queries @ keys.transpose(-1, -2) + mask[:, None, None]).softmax(-1)
    mixed, received = attend_and_receive(queries, keys, values, mask, shares)
    torch.testing.assert_close(mixed, (attention @ values).transpose(1, 2).flatten(2), **EXACT)
    torch.testing.assert_close(received, (attention.sum(1) * shares[..., None]).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quota", [1, 2, 6, 13, 35])
def test_holov_official_is_the_published_port(quota: int, tiny: Tiny) -> None:
    inputs = inputs_of(_vision(tiny.theirs), [WIDE, CLIP, ONE], quota=quota)
    longest = max(inputs.counts)
    _, positions, counts, saliency = run(tiny.module("holov-official"), inputs, min(quota, longest), [quota] * 3)
    for picture, own in enumerate(inputs.counts):
        asked = min(quota, own)
        expected = official_qwen_positions(saliency[picture, :own].numpy(), inputs.source[picture, :own].numpy(), asked)
        assert int(counts[picture]) == asked == len(expected)
        assert positions[picture, :asked].tolist() == expected.tolist()


def test_holov_official_on_many_saliencies() -> None:
    """Peaks that fill strips (so tokens are lost), ties, and the vision_start token among the kept."""
    dice, module = np.random.default_rng(3), QwenVision(_spec_only(), policy_from_settings("holov-official"))
    lost = started = 0
    for trial in range(200):
        own = int(dice.integers(1, 90))
        quota = int(dice.integers(1, own + 1))
        saliency = (dice.pareto(0.4, own) + 1e-3).astype(np.float32)
        saliency = np.round(saliency / saliency.sum(), 3 if trial % 2 else 7).astype(np.float32)
        source = dice.permutation(own).astype(np.int64)
        rows = np.zeros(own + 4, dtype=np.float32)  # a neighbour's tokens come first
        rows[4 + source] = saliency
        crops = crops_of_official_qwen(own, max(quota - 1, 1))
        kept = module.selection(
            torch.from_numpy(rows),
            None,
            torch.from_numpy(np.stack([np.append(source + 4, [-1, -1]), np.append([0, 1], np.full(own, -1))])),
            torch.from_numpy(np.stack([np.append(crops, [-1, -1]), np.append([0, 0], np.full(own, -1))])),
            torch.tensor([own + 1]),
            torch.tensor([quota, 1]),
        )
        expected = official_qwen_positions(saliency, source, quota)
        assert kept.positions[0, :quota].tolist() == expected.tolist()
        assert (kept.positions[0, quota:] == -1).all()
        assert kept.counts.tolist() == [quota, 1]
        assert kept.positions[1, 0] == 1, "the last of the neighbour's two tokens"
        lost += int((expected == -1).any())
        started += int((expected == own).any())
    assert lost > 5
    assert started > 20


def _spec_only() -> ModelSpec:
    return make_tiny().spec


def test_window_order_is_what_makes_the_published_port_choose_wrongly() -> None:
    """Mistake A: the tower's first rows are the candidates' first, whatever tokens they are."""
    saliency, source = np.zeros(18, dtype=np.float32), np.arange(18)[::-1].copy()
    saliency[17] = 0.9  # the last token, in the first row of the tower
    saliency[:17] = 0.1 / 17
    assert official_qwen_positions(saliency, source, 2).tolist() == [18, 17], "the vision_start token takes its place"


@pytest.mark.parametrize("method", [name for name, policy in POLICIES.items() if not policy.packs])
def test_rules_that_do_not_pack_are_refused(method: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=method):
        QwenVision(tiny.spec, _policy(method))


def test_names_are_those_of_checkpoints(tiny: Tiny) -> None:
    config = Qwen2_5_VLConfig(vision_config=tiny.theirs.config.to_dict())
    with torch.device("meta"):
        model: Any = modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(config)
    stored = {name for name in model.state_dict() if ".visual." in name}
    found = set()
    for name, parameter in tiny.module("holov").named_parameters():
        assert checkpoint_names(name)[0].startswith("visual.")
        (match,) = stored & set(checkpoint_names(name))
        assert shaped(name, model.state_dict()[match]).shape == parameter.shape
        found.add(match)
    assert found == stored


class Exported:
    """A module and its graph in ONNX Runtime."""

    def __init__(self, tiny: Tiny, method: str, folder: Path, precision: Precision = Precision.FP32) -> None:
        self.module, plan = tiny.module(method, precision), tiny.plan(method, precision)
        self.path = save_vision(onnx_from_graph(self.module, plan), folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Inputs, budget: int, quota: Sequence[int]) -> Outputs:
        values = (*inputs.before_budget, torch.tensor([budget]), torch.tensor(quota))
        names = [value.name for value in self.session.get_inputs()]
        out = self.session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True)))
        one, two, three, four = (torch.from_numpy(value) for value in out)
        return one, two, three, four


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def of_method(method: str) -> Exported:
        if method not in made:
            made[method] = Exported(tiny, method, tmp_path_factory.mktemp(method))
        return made[method]

    return of_method


@pytest.mark.parametrize("method", ["holov", "holov-official", "scope", "dart", "none"])
@pytest.mark.parametrize("name", list(GRIDS))
def test_onnx_runtime_says_what_torch_says(
    method: str, name: str, tiny: Tiny, exported: Callable[[str], Exported]
) -> None:
    budget, graph = 7, exported(method)
    inputs = inputs_of(_vision(tiny.theirs), GRIDS[name], quota=budget if method == "holov-official" else None)
    quota = [budget, 3, 1][: len(inputs.grids)]
    asked = min(budget, max(inputs.counts))
    ours, theirs = run(graph.module, inputs, asked, quota), graph.run(inputs, asked, quota)
    assert theirs[1].tolist() == ours[1].tolist()
    assert theirs[2].tolist() == ours[2].tolist()
    torch.testing.assert_close(theirs[0], ours[0], **EXACT)
    torch.testing.assert_close(theirs[3], ours[3], rtol=1e-5, atol=1e-7)
    assert theirs[0].shape == (len(inputs.grids), asked, tiny.spec.decoder.width)


def test_onnx_runtime_at_full_budget_is_transformers_own(tiny: Tiny, exported: Callable[[str], Exported]) -> None:
    inputs = inputs_of(_vision(tiny.theirs), GRIDS["more-patches-than-a-block"])
    longest = max(inputs.counts)
    tokens = exported("holov").run(inputs, longest + 50, [longest, longest])[0]
    assert tokens.shape[1] == longest, "the budget is clamped to the axis"
    for picture, expected in enumerate(merged_by_transformers(tiny, inputs)):
        torch.testing.assert_close(tokens[picture, : len(expected)], expected, rtol=2e-5, atol=2e-5)


def test_float16_runs_and_decides_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    graph = Exported(tiny, "holov", tmp_path, Precision.FP16)
    exact = inputs_of(_vision(tiny.theirs), [WIDE, ONE])
    inputs = Inputs(exact.patches, exact.grids, exact.pixels.half(), exact.tables, exact.source, exact.crops)
    tokens, positions, _, saliency = graph.run(inputs, 6, [6, 1])
    assert (tokens.dtype, saliency.dtype) == (torch.float16, torch.float32)
    wide = run(tiny.module("holov"), exact, 6, [6, 1])
    torch.testing.assert_close(saliency, wide[3], rtol=0.05, atol=2e-4)
    both = (positions == wide[1]) & (positions >= 0)
    assert both.sum() >= 4
    torch.testing.assert_close(tokens.float()[both], wide[0][both], rtol=0.05, atol=0.05)


def test_the_graph_has_one_loop_and_no_map_of_the_last_block(exported: Callable[[str], Exported]) -> None:
    kinds = {method: Counter(_operators(exported(method).path)) for method in ("holov", "none")}
    assert kinds["holov"]["Loop"] == 1
    assert kinds["none"]["Loop"] == 0
    assert kinds["holov"]["Softmax"] == kinds["none"]["Softmax"] == 4, "the last block's is in the loop"
    for kind in kinds.values():
        assert not {"NonZero", "If", "Scan", "SequenceAt", "SplitToSequence", "CastLike"} & set(kind)


@pytest.mark.parametrize("method", ["holov", "scope", "none"])
def test_shapes_come_from_the_budget_and_from_other_shapes(method: str, exported: Callable[[str], Exported]) -> None:
    model = onnx.load(exported(method).path, load_external_data=False)
    assert sources_of(model, shape_values(model)) <= {"budget"}


@pytest.mark.parametrize("method", ["holov", "holov-official", "none"])
def test_tensorrt_has_nothing_against_the_graph(method: str, exported: Callable[[str], Exported]) -> None:
    report = readiness_of(exported(method).path, ("8.6", "10.3", "10.13", "11.1"))
    assert {version.tensorrt: version.ready for version in report.versions} == dict.fromkeys(
        ("8.6", "10.3", "10.13", "11.1"), True
    )


def _operators(path: Path) -> Iterator[str]:
    graphs = [onnx.load(path, load_external_data=False).graph]
    for graph in graphs:
        for node in graph.node:
            yield node.op_type
            graphs.extend(attribute.g for attribute in node.attribute if attribute.g.node)
