"""From checkpoint directories to specifications: each family's own files, what the hub publishes, what is refused."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CHAT_TEMPLATE, TinyLlava, write_checkpoint
from family_checkpoints import FAMILIES, processor_of, write_family
from PIL import Image
from safetensors import safe_open
from transformers import LlavaNextImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from holov_export.catalog import CATALOG
from holov_export.errors import CheckpointError, UnsupportedModelError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.runtime.prompt import prompt_from_question
from holov_export.spec import FramePairsSpec, FramesSpec, ImageSpec, ModelSpec, PatchImageSpec, TiledImageSpec

EDITABLE = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    made = {family: write_family(base / family, family) for family in FAMILIES}
    return {**made, "llava": write_checkpoint(base / "llava")}


@pytest.fixture
def edited(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's checkpoint, without weights; `edited(family, {file: change})` changes JSON files."""

    def copy(family: str, changes: dict[str, Callable[[dict[str, Any]], object]] | None = None) -> Path:
        folder = tmp_path / family
        shutil.copytree(folders[family], folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        for file, change in (changes or {}).items():
            content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
            change(content)
            (folder / file).write_text(json.dumps(content))
        return folder

    return copy


def spec_of(folder: Path) -> ModelSpec:
    return spec_from_checkpoint(folder, "tiny")


# What the tiny checkpoints are


TOWERS = ("vision_tower", "image_tower", "video_tower", "visual", "multi_modal_projector")


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_those_of_the_weights(name: str, folders: dict[str, Path]) -> None:
    spec = spec_of(folders[name])
    with safe_open(folders[name] / "model.safetensors", "pt") as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    seeing = {key: shape for key, shape in shapes.items() if any(tower in key for tower in TOWERS)}
    speaking = {key: shape for key, shape in shapes.items() if key not in seeing}

    def shape(ending: str, where: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        found = {size for key, size in where.items() if key.endswith(ending)}
        assert len(found) == 1, (ending, found)
        return found.pop()

    def layers(where: dict[str, tuple[int, ...]]) -> set[int]:
        return {int(found[1]) for key in where if (found := re.search(r"(?:layers|blocks)\.(\d+)\.", key))}

    decoder, vision = spec.decoder, spec.vision
    assert shape("embed_tokens.weight", speaking) == (decoder.vocab_size, decoder.width)
    assert shape("q_proj.weight", speaking) == (decoder.heads * decoder.head_width, decoder.width)
    assert shape("k_proj.weight", speaking) == (decoder.kv_heads * decoder.head_width, decoder.width)
    assert shape("down_proj.weight", speaking) == (decoder.width, decoder.mlp_width)
    assert layers(speaking) == set(range(decoder.layers))
    assert layers(seeing) == set(range(vision.layers))
    side = (vision.patch_size, vision.patch_size)
    if vision.architecture == "clip":
        assert shape("patch_embedding.weight", seeing) == (vision.width, 3, *side)
        assert shape("position_embedding.weight", seeing) == (spec.clip.tokens + 1, vision.width)
        assert shape("mlp.fc1.weight", seeing) == (vision.mlp_width, vision.width)
        assert shape("linear_1.weight", seeing) == (decoder.width, vision.width)
    else:
        assert shape("patch_embed.proj.weight", seeing) == (vision.width, 3, vision.temporal_patch_size, *side)
        assert shape("attn.qkv.weight", seeing) == (3 * vision.width, vision.width)
        assert shape("gate_proj.weight", seeing) == (vision.mlp_width, vision.width)
        assert shape("merger.mlp.2.weight", seeing) == (decoder.width, vision.unit * vision.width)
    assert decoder.vocab_size not in {size[0] for key, size in shapes.items() if "proj" in key or "fc" in key}


@pytest.mark.parametrize("name", FAMILIES)
def test_placeholders_and_prompts_are_the_processors(name: str, folders: dict[str, Path]) -> None:
    spec, processor = spec_of(folders[name]), processor_of(folders[name])
    kinds = {"image": (spec.prompt.image_placeholder, spec.decoder.image_token_id)}
    if spec.video.kind != "none":
        assert spec.decoder.video_token_id is not None
        kinds["video"] = (spec.prompt.video_placeholder, spec.decoder.video_token_id)
    for kind, (text, token) in kinds.items():
        assert processor.tokenizer.convert_tokens_to_ids(text) == token
        message = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "what is shown?"}]}]
        theirs = processor.apply_chat_template(message, add_generation_prompt=True)
        count = {f"{kind}s": 1} if kind == "image" else {"images": 0, "videos": 1}
        assert prompt_from_question("what is shown?", spec.prompt, **count) == theirs
        assert theirs.count(text) == 1


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def placeholders(processor: Any, token: int, text: str, **media: Any) -> int:
    return int((processor(text=text, return_tensors="pt", **media)["input_ids"] == token).sum())


@pytest.mark.parametrize("name", ["llava_next", "llava_next_mistral", "qwen2_5_vl"])
def test_no_picture_has_more_tokens_and_one_has_as_many(name: str, folders: dict[str, Path]) -> None:
    spec, processor = spec_of(folders[name]), processor_of(folders[name])
    text, token = spec.prompt.image_placeholder, spec.decoder.image_token_id
    sizes = [(20, 400), (60, 60), (112, 112), (224, 112), (112, 336), (1000, 1100), (280, 560), (392, 400)]
    counts = []
    for width, height in sizes:
        count = placeholders(processor, token, text, images=picture(width, height))
        if isinstance(spec.image, TiledImageSpec):
            count -= newline_rows(spec, height, width)
        counts.append(count)
    assert max(counts) == spec.image_tokens
    if isinstance(spec.image, PatchImageSpec):
        assert min(counts) >= spec.image.min_pixels // spec.image.token_pixels**2


def newline_rows(spec: ModelSpec, height: int, width: int) -> int:
    """Rows of the unpadded mosaic, by transformers' own function."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    assert isinstance(spec.image, TiledImageSpec)
    pinpoints = [list(point) for point in spec.image.pinpoints]
    down, across = get_anyres_image_grid_shape((height, width), pinpoints, spec.clip.image_size)
    side = spec.clip.grid[0]
    return int(unpad_image(torch.zeros(1, down * side, across * side), (height, width)).shape[1])


def test_clips_have_the_tokens_of_the_processor(folders: dict[str, Path]) -> None:
    video = spec_of(folders["video_llava"])
    assert isinstance(video.video, FramesSpec)
    frames = np.zeros((video.video.frames, 40, 70, 3), dtype=np.uint8)
    count = placeholders(
        processor_of(folders["video_llava"]), video.decoder.video_token_id or 0, "<video>", videos=[frames]
    )
    assert count == video.video_tokens == 8 * 17

    qwen = spec_of(folders["qwen2_5_vl"])
    assert isinstance(qwen.video, FramePairsSpec)
    clip = np.zeros((qwen.video.max_frames, 168, 224, 3), dtype=np.uint8)
    text = qwen.prompt.video_placeholder
    count = placeholders(processor_of(folders["qwen2_5_vl"]), qwen.decoder.video_token_id or 0, text, videos=[clip])
    assert count == qwen.video_tokens == 6 * 48


def test_numbers_of_each_family(folders: dict[str, Path]) -> None:
    following = spec_of(folders["llava_next"])
    assert following.family == "llava_next"
    assert following.image == TiledImageSpec(
        tile=clip_square(56), pinpoints=((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
    )
    assert (following.decoder.architecture, following.decoder.eos_token_ids) == ("llama", (2,))
    assert spec_of(folders["llava_next_mistral"]).decoder.architecture == "mistral"

    clips = spec_of(folders["video_llava"])
    assert clips.image == clip_square(56)
    assert clips.video == FramesSpec(frames=8, image=clip_square(56), cls=True)

    qwen = spec_of(folders["qwen2_5_vl"])
    assert qwen.decoder.mrope_sections == (4, 6, 6)
    assert qwen.decoder.eos_token_ids == (378, 376), "generation_config.json has two"
    assert qwen.vision.model_dump(include={"window_size", "full_layers", "theta", "norm_eps"}) == {
        "window_size": 56,
        "full_layers": (1, 3),
        "theta": 10000.0,
        "norm_eps": 1e-6,
    }
    assert qwen.video == FramePairsSpec(
        fps=2.0,
        min_frames=4,
        max_frames=12,
        min_pixels=8 * 784,
        max_pixels=48 * 784,
        total_pixels=2 * 115200 * 784,
        tokens_per_second=2,
    )


def clip_square(side: int) -> ImageSpec:
    return ImageSpec(
        shortest_edge=side,
        crop=(side, side),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )


# What the hub publishes: config.json and preprocessor_config.json, no weights

VICUNA_7B = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}
VICUNA_13B = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
MISTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32064,
}
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_SETTINGS = {"crop_size": {"height": 336, "width": 336}, "resample": 3, "size": {"shortest_edge": 336}}


def llava_config(family: str, text: dict[str, Any], image_size: int | None, **more: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "vision_config": {**VIT_L, **({"image_size": image_size} if image_size else {})},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        **more,
    }


def qwen_config(width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": width,
        "image_token_id": 151655,
        "intermediate_size": mlp,
        "max_position_embeddings": 128000,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1000000.0,
        "video_token_id": 151656,
        "vision_config": {
            "hidden_size": 1280,
            "in_chans": 3,
            "model_type": "qwen2_5_vl",
            "out_hidden_size": width,
            "spatial_patch_size": 14,
            "tokens_per_second": 2,
        },
        "vocab_size": vocab,
    }


TILES = {
    **CLIP_SETTINGS,
    "do_pad": True,
    "image_grid_pinpoints": PINPOINTS,
    "image_processor_type": "LlavaNextImageProcessor",
}
AREAS = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
PUBLISHED = {
    "llava-1.5-13b": (llava_config("llava", VICUNA_13B, 336), CLIP_SETTINGS),
    "llava-v1.6-vicuna-7b": (llava_config("llava_next", VICUNA_7B, 336, image_grid_pinpoints=PINPOINTS), TILES),
    "llava-v1.6-vicuna-13b": (llava_config("llava_next", VICUNA_13B, 336, image_grid_pinpoints=PINPOINTS), TILES),
    "llava-v1.6-mistral-7b": (llava_config("llava_next", MISTRAL, 336, image_grid_pinpoints=PINPOINTS), TILES),
    "video-llava-7b": (
        llava_config("video_llava", VICUNA_7B, None, video_token_index=32001),
        {"crop_size": {"height": 224, "width": 224}, "resample": 3, "size": {"shortest_edge": 224}},
    ),
    "qwen2.5-vl-3b": (qwen_config(2048, 36, 16, 2, 11008, 151936), AREAS),
    "qwen2.5-vl-7b": (qwen_config(3584, 28, 28, 4, 18944, 152064), AREAS),
}


def published(folder: Path, name: str) -> Path:
    config, processor = PUBLISHED[name]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    names = {32000: "<image>", 32001: "<video>", 151655: "<|image_pad|>", 151656: "<|video_pad|>"}
    tokens = [{"id": index, "content": text} for index, text in names.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name: str, tmp_path: Path) -> None:
    spec = spec_from_checkpoint(published(tmp_path, name), name)
    assert spec.image_tokens == CATALOG[name].tokens
    size = {"3b": 3e9, "7b": 6.5e9, "13b": 13e9}[name.rpartition("-")[2]]
    text = spec.decoder
    attention = text.width * text.head_width * 2 * (text.heads + text.kv_heads)
    made = text.layers * (attention + 3 * text.width * text.mlp_width) + text.vocab_size * text.width
    assert made == pytest.approx(size, rel=0.17), "sizes are those of the language model that the name says"
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    if spec.family == "video_llava":
        assert spec.video_tokens == 8 * 257
        assert "<video>" in prompt_from_question("why?", spec.prompt, images=0, videos=1)
    elif spec.family == "qwen2_5_vl":
        assert spec.video_tokens == 115200, "nine tenths of 128000"
        assert spec.decoder.mrope_sections == (16, 24, 24)
        assert spec.vision.model_dump(include={"layers", "heads", "mlp_width", "window_size", "full_layers"}) == {
            "layers": 32,
            "heads": 16,
            "mlp_width": 3420,
            "window_size": 112,
            "full_layers": (7, 15, 23, 31),
        }
    else:
        assert (spec.vision.feature_layer, spec.video_tokens, spec.decoder.video_token_id) == (22, 0, None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava-1.5-13b", "USER: <image>\nwhy? ASSISTANT:"),
        ("llava-v1.6-vicuna-7b", "USER: <image>\nwhy? ASSISTANT:"),
        ("llava-v1.6-mistral-7b", "[INST] <image>\nwhy? [/INST]"),
        ("video-llava-7b", "USER: <image>\nwhy? ASSISTANT:"),
        (
            "qwen2.5-vl-7b",
            (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                "<|vision_start|><|image_pad|><|vision_end|>why?<|im_end|>\n<|im_start|>assistant\n"
            ),
        ),
    ],
)
def test_template_of_the_family_where_there_is_none(name: str, text: str, tmp_path: Path) -> None:
    spec = spec_from_checkpoint(published(tmp_path, name), name)
    assert prompt_from_question("why?", spec.prompt) == text


def test_the_checkpoints_own_template_wins(edited: Callable[..., Path]) -> None:
    folder = edited("llava_next_mistral")
    assert spec_of(folder).prompt.chat_template != CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text("{{ 'jinja' }}")
    assert spec_of(folder).prompt.chat_template == "{{ 'jinja' }}"


# A checkpoint shaped like LLaVA-1.5 works from its configuration alone


@pytest.mark.parametrize(
    ("sizes", "settings", "image"),
    [
        (
            TinyLlava(image_size=84, patch_size=14),
            {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}},
            (84, None),
        ),
        (
            TinyLlava(image_size=28),
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}},
            (32, None),
        ),
        (TinyLlava(), {"size": 56, "crop_size": 56}, (56, None)),
        (TinyLlava(), {"size": {"height": 56, "width": 56}, "do_center_crop": False}, (None, (56, 56))),
        (TinyLlava(), {"size": [60, 70], "crop_size": [56, 56]}, (None, (60, 70))),
        (TinyLlava(width=112, heads=7, kv_heads=1), {"do_resize": False}, (None, None)),
    ],
)
def test_other_llava_shapes(
    tmp_path: Path, sizes: TinyLlava, settings: dict[str, Any], image: tuple[int | None, tuple[int, int] | None]
) -> None:
    folder = write_checkpoint(tmp_path / "other", sizes)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    spec = spec_of(folder)
    assert isinstance(spec.image, ImageSpec)
    assert (spec.image.shortest_edge, spec.image.resize_to) == image
    assert spec.image_tokens == (sizes.image_size // sizes.patch_size) ** 2
    assert (spec.decoder.width, spec.decoder.heads, spec.decoder.kv_heads) == (sizes.width, sizes.heads, sizes.kv_heads)


def test_another_projector(edited: Callable[..., Path]) -> None:
    change = {"projector_hidden_act": "gelu_pytorch_tanh", "multimodal_projector_bias": False}
    spec = spec_of(edited("llava", {"config.json": lambda config: config.update(change)}))
    assert (spec.clip.projector_activation, spec.clip.projector_bias) == ("gelu_pytorch_tanh", False)


# Settings of processors


def test_settings_inside_the_processors_file_win(edited: Callable[..., Path]) -> None:
    nested = {**CLIP_SETTINGS, "size": {"shortest_edge": 77}, "crop_size": {"height": 56, "width": 56}}
    folder = edited("video_llava", {"processor_config.json": lambda config: config.update(image_processor=nested)})
    spec = spec_of(folder)
    assert isinstance(spec.image, ImageSpec)
    assert spec.image.shortest_edge == 77
    nested_video = {**nested, "size": {"shortest_edge": 99}, "num_frames": 6}
    folder = edited(
        "video_llava", {"processor_config.json": lambda config: config.update(video_processor=nested_video)}
    )
    video = spec_of(folder).video
    assert isinstance(video, FramesSpec)
    assert (video.frames, video.image.shortest_edge) == (6, 99)


def test_defaults_are_those_of_transformers(edited: Callable[..., Path]) -> None:
    def emptied(family: str, side: int | None) -> ModelSpec:
        changes: dict[str, Callable[[dict[str, Any]], object]] = {"preprocessor_config.json": dict.clear}
        if side is not None:
            changes["config.json"] = lambda config: config["vision_config"].update(image_size=side)
        if family == "llava_next":
            changes["config.json"] = lambda config: (
                config["vision_config"].update(image_size=224),
                config.update(image_grid_pinpoints=[[448, 224]]),
            )
        return spec_of(edited(family, changes))

    for family, theirs in (
        ("llava", CLIPImageProcessorPil()),
        ("llava_next", LlavaNextImageProcessorPil()),
        ("video_llava", VideoLlavaImageProcessor()),
    ):
        image = emptied(family, 224).image
        tile = image.tile if isinstance(image, TiledImageSpec) else image
        assert isinstance(tile, ImageSpec)
        assert tile.crop == (theirs.crop_size["height"], theirs.crop_size["width"])
        assert tile.shortest_edge == theirs.size["shortest_edge"]
        assert (tile.resample, int(theirs.resample)) == ("bicubic", 3)
        assert (list(tile.mean), list(tile.std)) == (list(theirs.image_mean), list(theirs.image_std))
        assert not tile.pad_to_square

    patches, qwen = emptied("qwen2_5_vl", None).image, Qwen2VLImageProcessorPil()
    assert isinstance(patches, PatchImageSpec)
    assert (patches.min_pixels, patches.max_pixels) == (qwen.size["shortest_edge"], qwen.size["longest_edge"])
    assert list(patches.mean) == list(qwen.image_mean)


def test_defaults_of_clips_are_those_of_transformers(edited: Callable[..., Path]) -> None:
    """Read from the source: the class cannot be made without torchvision."""
    found = importlib.util.find_spec("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    assert found is not None
    assert found.origin is not None
    module = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    body = next(
        node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Qwen2VLVideoProcessor"
    ).body
    theirs = {
        node.targets[0].id: eval(ast.unparse(node.value))  # numbers such as 28 * 28 * 768
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("size", "min_frames", "max_frames", "max_video_tokens")
    }
    folder = edited("qwen2_5_vl")
    (folder / "video_preprocessor_config.json").unlink()
    video = spec_of(folder).video
    assert isinstance(video, FramePairsSpec)
    assert {"shortest_edge": video.min_pixels, "longest_edge": video.max_pixels} == theirs["size"]
    assert (video.min_frames, video.max_frames) == (theirs["min_frames"], theirs["max_frames"])
    assert video.total_pixels == int(theirs["max_video_tokens"] * 784 * 0.9) * 2
    assert video.frame_pixels(4) == video.max_pixels
    assert video.frame_pixels(768) == video.total_pixels // 768
    assert video.frame_pixels(100_000) == int(1.05 * video.min_pixels)


@pytest.mark.parametrize(
    ("settings", "areas"),
    [
        ({"min_pixels": 784, "max_pixels": 7840}, (784, 7840)),
        (
            {"size": {"shortest_edge": 1568, "longest_edge": 78400}, "min_pixels": None, "max_pixels": None},
            (1568, 78400),
        ),
        ({"size": {"shortest_edge": 1568, "longest_edge": 78400}, "min_pixels": 784, "max_pixels": None}, (784, 78400)),
        ({"min_pixels": 784, "max_pixels": None}, (784, 28 * 28 * 1280)),
    ],
)
def test_both_forms_of_areas(edited: Callable[..., Path], settings: dict[str, Any], areas: tuple[int, int]) -> None:
    def change(content: dict[str, Any]) -> None:
        content.pop("min_pixels"), content.pop("max_pixels")
        content.update(settings)

    folder = edited("qwen2_5_vl", {"preprocessor_config.json": change})
    image = spec_of(folder).image
    assert isinstance(image, PatchImageSpec)
    assert (image.min_pixels, image.max_pixels) == areas
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder).size
    assert areas == (theirs["shortest_edge"], theirs["longest_edge"])


def test_clips_without_a_cap(edited: Callable[..., Path]) -> None:
    folder = edited(
        "qwen2_5_vl", {"video_preprocessor_config.json": lambda item: item.update(cap_pixels_per_frame=False)}
    )
    video = spec_of(folder).video
    assert isinstance(video, FramePairsSpec)
    assert video.total_pixels == video.max_pixels * video.max_frames


# What is refused


def config_change(**values: Any) -> dict[str, Callable[[dict[str, Any]], object]]:
    return {"config.json": lambda config: config.update(values)}


def nested_change(part: str, **values: Any) -> dict[str, Callable[[dict[str, Any]], object]]:
    return {"config.json": lambda config: config[part].update(values)}


def processor_change(**values: Any) -> dict[str, Callable[[dict[str, Any]], object]]:
    return {"preprocessor_config.json": lambda settings: settings.update(values)}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llava", config_change(model_type="qwen2_vl"), "another tower than Qwen2.5-VL"),
        ("llava", config_change(model_type="qwen3_vl"), "features of several layers"),
        (
            "llava",
            config_change(model_type="llava_onevision"),
            "'llava_next', 'qwen2_5_vl', 'video_llava' can be exported",
        ),
        ("llava", config_change(model_type=None), "family 'None'"),
        ("llava_next", config_change(vision_feature_layer=[-2, -4]), "several vision feature layers"),
        ("video_llava", config_change(vision_feature_select_strategy="full"), "'full'"),
        ("llava_next", nested_change("vision_config", model_type="siglip_vision_model"), "siglip_vision_model"),
        (
            "llava_next",
            processor_change(image_grid_pinpoints=[[56, 100]]),
            "56 x 100, which is no multiple of a tile of 56 x 56",
        ),
        (
            "llava_next",
            processor_change(crop_size={"height": 42, "width": 56}),
            "42 x 56 pixels, but the tower reads 56 x 56",
        ),
        ("video_llava", processor_change(do_center_crop=False), "of no fixed size"),
        ("video_llava", processor_change(size={"shortest_edge": 56, "longest_edge": 90}), "longest edge"),
        ("qwen2_5_vl", processor_change(do_resize=False), "do_resize"),
        ("qwen2_5_vl", nested_change("vision_config", fullatt_block_indexes=[0, 2]), "last layer attends to windows"),
    ],
)
def test_unsupported(
    edited: Callable[..., Path], family: str, changes: dict[str, Callable[[dict[str, Any]], object]], words: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(edited(family, changes))
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "llava_next",
            processor_change(image_grid_pinpoints=[[56, 112]]),
            "config.json and of the image processor differ",
        ),
        ("llava_next", config_change(image_token_index=400), "no special token with the image token's id 400"),
        ("video_llava", config_change(video_token_index=401), "no special token with the video token's id 401"),
        ("qwen2_5_vl", processor_change(patch_size=16), "patch_size of the processor is 16, of the tower 14"),
        ("qwen2_5_vl", processor_change(min_pixels=500000), "no smallest and largest area"),
        ("qwen2_5_vl", nested_change("vision_config", out_hidden_size=96), "96 wide, the language model's 128"),
        ("qwen2_5_vl", nested_change("vision_config", window_size=50), "not usable"),
        ("llava_next", nested_change("text_config", hidden_size="wide"), "config.json of 'tiny' is refused"),
        ("video_llava", processor_change(resample=9), "not usable"),
    ],
)
def test_contradictions(
    edited: Callable[..., Path], family: str, changes: dict[str, Callable[[dict[str, Any]], object]], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_of(edited(family, changes))
    assert words in str(caught.value)


def test_sections_that_do_not_divide_the_frequencies(edited: Callable[..., Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 7]

    with pytest.raises(CheckpointError, match="does not divide the 16"):
        spec_of(edited("qwen2_5_vl", {"config.json": change}))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.json", "config.json"])
def test_a_file_is_missing(edited: Callable[..., Path], file: str) -> None:
    folder = edited("qwen2_5_vl")
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"has no {file}"):
        spec_of(folder)
