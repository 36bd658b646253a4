"""Which module a plan gets, how its weights are found in every spelling, and the arguments that it is traced with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_towers import WEIGHTS, noisy_family, plan_of, video_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from holov_export.errors import CheckpointError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.policies import POLICIES
from holov_export.spec import Cut, ExportPlan, ModelSpec, Precision, QwenVisionSpec
from holov_export.vision.clip import LlavaVision
from holov_export.vision.clip_packed import PackedClipVision
from holov_export.vision.families import (
    FAMILIES,
    Part,
    checkpoint_names,
    example_inputs,
    newline_from_checkpoint,
    plain_from_plan,
    vision_from_plan,
)
from holov_export.vision.loading import module_from_checkpoint
from holov_export.vision.plain import PlainVision
from holov_export.vision.qwen2_5_vl import QwenVision
from holov_export.vision.weights import SafetensorsReader

PARTS: list[tuple[str, Part]] = [
    ("llava", "image"),
    ("llava_next", "image"),
    ("qwen2_5_vl", "image"),
    ("video_llava", "image"),
    ("video_llava", "video"),
]
#: what the checkpoints call the tower of each of our graphs
TOWERS = {("video_llava", "image"): "image_tower", ("video_llava", "video"): "video_tower"}


@pytest.fixture(scope="module")
def folders(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    work, others = tmp_path_factory.mktemp("families"), ("llava_next", "qwen2_5_vl", "video_llava")
    return {"llava": llava_checkpoint, **{family: noisy_family(work / family, family) for family in others}}


@pytest.fixture(scope="module")
def specs(folders: dict[str, Path]) -> dict[str, ModelSpec]:
    """One of each family."""
    return {family: spec_from_checkpoint(folder, "tiny") for family, folder in folders.items()}


def test_every_family_is_tested(specs: dict[str, ModelSpec]) -> None:
    assert set(FAMILIES) == set(specs) == {family for family, _ in PARTS}


@pytest.mark.parametrize(
    ("family", "part", "pruned", "plain"),
    [
        ("llava", "image", LlavaVision, PlainVision),
        ("llava_next", "image", PackedClipVision, PackedClipVision),
        ("qwen2_5_vl", "image", QwenVision, QwenVision),
        ("video_llava", "image", LlavaVision, PlainVision),
        ("video_llava", "video", PackedClipVision, PackedClipVision),
    ],
)
def test_modules(
    family: str, part: Part, pruned: type, plain: type, specs: dict[str, ModelSpec], folders: dict[str, Path]
) -> None:
    plan = plan_of(specs[family], "holov", part, Precision.BF16)
    with SafetensorsReader(folders[family]) as reader:
        module = vision_from_plan(plan, reader)
        wanted = sum(parameter.numel() for parameter in module.parameters())
        assert reader.bytes_read == 4 * wanted, "only what the module needs is read"
        without = plain_from_plan(plan, reader, Precision.FP32)
    assert type(module) is pruned
    assert type(without) is plain
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in without.parameters()} == {torch.float32}
    assert not any(value.is_meta for value in (*module.parameters(), *module.buffers()))
    assert not module.training
    names = [name for name, _ in module.named_parameters()]
    assert names == [name for name, _ in without.named_parameters()]


def test_the_two_towers_of_video_llava_are_not_mixed_up(specs: dict[str, ModelSpec], folders: dict[str, Path]) -> None:
    spec, folder = specs["video_llava"], folders["video_llava"]
    model, side = video_model(folder), spec.clip.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        image = model.get_image_features(pixels).pooler_output
        video = model.model.get_video_features(pixels[None]).pooler_output
    full = torch.tensor([spec.clip.tokens])
    with SafetensorsReader(folder) as reader, torch.no_grad():
        ours = vision_from_plan(plan_of(spec), reader)(pixels, full, full.expand(2))[0]
        rows = torch.arange(2 * (spec.clip.tokens + 1))[None]
        every = torch.tensor([rows.shape[1]])
        clip = vision_from_plan(plan_of(spec, part="video"), reader)(pixels, rows, rows * 0, every, every)[0]
    torch.testing.assert_close(ours, image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip[0], video.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert float((image - video[:, 1:]).abs().max()) > 0.1, "the two towers are alike"


@pytest.mark.parametrize("cut", [Cut(layer=1), Cut(layer=0)])
@pytest.mark.parametrize(("family", "part"), [part for part in PARTS if part not in (("llava", "image"), PARTS[3])])
def test_cuts_inside_a_packed_tower_are_refused(
    family: str, part: Part, cut: Cut, specs: dict[str, ModelSpec], folders: dict[str, Path]
) -> None:
    plan = plan_of(specs[family], "holov", part).model_copy(update={"cuts": (cut,)})
    with SafetensorsReader(folders[family]) as reader, pytest.raises(ValueError, match="cut"):
        vision_from_plan(plan, reader)


def published_names(front: str, tower: str, inner: str, spec: ModelSpec) -> Iterator[str]:
    """Names of a CLIP tower and the projector in one spelling."""
    vision = spec.clip
    config = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    for name, _ in CLIPVisionModel(config).named_parameters():
        yield f"{front}{tower}.{inner}{name.removeprefix('vision_model.')}"
    for layer in (1, 2):
        yield from (f"{front}multi_modal_projector.linear_{layer}.{kind}" for kind in ("weight", "bias"))


@pytest.mark.parametrize("front", ["", "model."])
@pytest.mark.parametrize("inner", ["", "vision_model."])
@pytest.mark.parametrize(("family", "part"), [part for part in PARTS if part[0] != "qwen2_5_vl"])
def test_every_parameter_is_found_in_every_spelling(
    family: str, part: Part, front: str, inner: str, specs: dict[str, ModelSpec]
) -> None:
    spec = specs[family]
    published = set(published_names(front, TOWERS.get((family, part), "vision_tower"), inner, spec))
    with torch.device("meta"):
        module = FAMILIES[family].build(plan_of(spec, "cls-topk", part))
    for name, _ in module.named_parameters():
        assert len(published & set(checkpoint_names(family, part, name))) == 1, name


@pytest.mark.parametrize("front", ["", "model."])
@pytest.mark.parametrize("inner", ["", "vision_model."])
@pytest.mark.parametrize(("family", "part"), [("llava_next", "image"), ("video_llava", "video")])
def test_respelt_checkpoints_give_the_same_weights(
    family: str,
    part: Part,
    front: str,
    inner: str,
    folders: dict[str, Path],
    specs: dict[str, ModelSpec],
    tmp_path: Path,
) -> None:
    """transformers 4.x wrote "vision_model." behind the tower's name, its modules are called "model." since 4.52."""
    folder = shutil.copytree(folders[family], tmp_path / "respelt")
    tensors = load_file(folder / WEIGHTS)
    tower = TOWERS.get((family, part), "vision_tower")
    assert f"{tower}.pre_layrnorm.weight" in tensors, "transformers writes another spelling now"
    respelt = {front + name.replace("_tower.", f"_tower.{inner}"): tensor for name, tensor in tensors.items()}
    save_file(respelt, folder / WEIGHTS, metadata={"format": "pt"})
    plan = plan_of(specs[family], "holov", part)
    with SafetensorsReader(folder) as reader, SafetensorsReader(folders[family]) as published:
        ours = dict(vision_from_plan(plan, reader).named_parameters())
        for name, parameter in vision_from_plan(plan, published).named_parameters():
            assert torch.equal(ours[name], parameter), name


@pytest.mark.parametrize("spelling", ["image_newline", "model.image_newline"])
def test_newline(spelling: str, tmp_path: Path) -> None:
    values = torch.linspace(-1, 1, 7).to(torch.bfloat16)
    save_file({spelling: values}, tmp_path / WEIGHTS)
    with SafetensorsReader(tmp_path) as reader:
        newline = newline_from_checkpoint(reader)
    assert newline.dtype == np.float32
    assert newline.tolist() == values.tolist()


def test_newline_of_a_checkpoint(folders: dict[str, Path], specs: dict[str, ModelSpec]) -> None:
    with SafetensorsReader(folders["llava_next"]) as reader:
        assert newline_from_checkpoint(reader).shape == (specs["llava_next"].decoder.width,)
    with SafetensorsReader(folders["video_llava"]) as reader, pytest.raises(CheckpointError, match="image_newline"):
        newline_from_checkpoint(reader)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_example_inputs_have_the_signature(
    family: str, part: Part, precision: Precision, specs: dict[str, ModelSpec]
) -> None:
    plan = plan_of(specs[family], "holov", part, precision)
    inputs, signature = example_inputs(plan), plan.signature[0]
    assert len(inputs) == len(signature)
    lengths: dict[str, int] = {}
    for value, spec in zip(inputs, signature, strict=True):
        assert str(value.dtype) == f"torch.{spec.dtype}", spec.name
        assert value.dim() == len(spec.shape), spec.name
        for size, axis in zip(value.shape, spec.shape, strict=True):
            if isinstance(axis, int):
                assert size == axis, spec.name
            else:
                assert size > 1, f"the exporter would take {axis} for a constant"
                assert lengths.setdefault(axis, size) == size, f"{spec.name}: {axis}"
    others = [size for axis, size in lengths.items() if axis != "batch"]
    assert len(set(others)) == len(others), "two axes of one length cannot be told from each other"


@pytest.mark.parametrize(("family", "part"), [part for part in PARTS if part not in (("llava", "image"), PARTS[3])])
def test_example_tables_fit_together(family: str, part: Part, specs: dict[str, ModelSpec]) -> None:
    plan = plan_of(specs[family], "holov", part)
    named = dict(zip([spec.name for spec in plan.signature[0]], example_inputs(plan), strict=True))
    source, crops, vision = named["source"], named["crops"], plan.model.vision
    if isinstance(vision, QwenVisionSpec):
        rows = named["pixel_values"].shape[0] // vision.unit
    else:
        rows = named["pixel_values"].shape[0] * (vision.tokens + (part == "video"))
    own = (source >= 0).sum(1)
    assert own[0] != own[1]
    assert int(own[0]) == source.shape[1] <= plan.tokens
    assert int(source.max()) < rows
    assert torch.equal(source < 0, crops < 0)
    for kind in ("window", "view"):
        if f"{kind}_rows" in named:
            table, slots = named[f"{kind}_rows"], named[f"{kind}_slots"]
            assert len(set((table >= 0).sum(1).tolist())) > 1, "of one size"
            assert torch.equal(table.flatten()[slots], torch.arange(len(slots)))
            assert int((table >= 0).sum()) == len(slots)


@pytest.mark.parametrize("method", [name for name, policy in POLICIES.items() if policy.packs])
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_modules_run_on_their_example(
    method: str, family: str, part: Part, specs: dict[str, ModelSpec], folders: dict[str, Path]
) -> None:
    plan = plan_of(specs[family], method, part)
    with SafetensorsReader(folders[family]) as reader, torch.no_grad():
        tokens, positions, counts, saliency = vision_from_plan(plan, reader)(*example_inputs(plan))
    assert tokens.shape == (2, 2, plan.model.decoder.width)
    assert counts.tolist() == [2, 1]
    assert positions[1, 1] == -1
    assert saliency.dim() == 2


def small(shape: tuple[int, ...]) -> nn.Module:
    """A module with a table of its own, as the selection rules have."""
    module = nn.Linear(*shape, bias=False)
    module.register_buffer("table", torch.tensor([1.0, 2.0]), persistent=False)
    return module


def test_tensors_may_be_stored_in_another_shape(tmp_path: Path) -> None:
    """Qwen2.5-VL stores its patch embedding as a convolution's kernel."""
    kernel = torch.randn(5, 3, 2, 4, 4)
    save_file({"proj.weight": kernel}, tmp_path / WEIGHTS)

    def flat(name: str, tensor: Tensor) -> Tensor:
        return tensor.flatten(1) if name == "weight" else tensor

    with SafetensorsReader(tmp_path) as reader:
        module = module_from_checkpoint(
            lambda: small((96, 5)), reader, Precision.FP32, lambda name: [f"proj.{name}"], flat
        )
        assert torch.equal(module.get_parameter("weight"), kernel.reshape(5, 96))
        assert module.get_buffer("table").tolist() == [1.0, 2.0]
        with pytest.raises(CheckpointError, match=r"\(5, 3, 2, 4, 4\).*config\.json says \(5, 96\)"):
            module_from_checkpoint(lambda: small((96, 5)), reader, Precision.FP32, lambda name: [f"proj.{name}"])


def test_parameters_take_no_memory_before_they_are_read(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def build() -> nn.Module:
        made.append(small((1 << 20, 1 << 14)))  # 64 GiB
        return made[0]

    save_file({"weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with SafetensorsReader(tmp_path) as reader, pytest.raises(CheckpointError, match="config"):
        module_from_checkpoint(build, reader, Precision.FP32, lambda name: [name])
    assert made[0].get_parameter("weight").is_meta
    assert not made[0].get_buffer("table").is_meta
    assert not torch.empty(3).is_meta, "back to normal"


def test_a_plan_keeps_its_own_precision(specs: dict[str, ModelSpec], folders: dict[str, Path]) -> None:
    plan: ExportPlan = plan_of(specs["llava_next"], precision=Precision.FP16)
    with SafetensorsReader(folders["llava_next"]) as reader:
        assert next(vision_from_plan(plan, reader).parameters()).dtype == torch.float16
        assert next(vision_from_plan(plan, reader, Precision.FP32).parameters()).dtype == torch.float32
