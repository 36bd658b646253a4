"""transformers' own vision towers, with all their attention maps, as what a bundle's vision graph is compared with.

Float32, whatever the checkpoint stores; the language model is not loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from holov_export.extras import require
from holov_export.policies import NoSelection
from holov_export.spec import ExportPlan, QwenVisionSpec
from holov_export.tensors import FloatArray, ImageLayout, PixelBatch, VisualTokens

if TYPE_CHECKING:
    import torch

#: where transformers keeps each family's projector, and what it calls it
_PROJECTORS = {
    "llava": ("transformers.models.llava.modeling_llava", "LlavaMultiModalProjector"),
    "llava_next": ("transformers.models.llava_next.modeling_llava_next", "LlavaNextMultiModalProjector"),
    "video_llava": ("transformers.models.video_llava.modeling_video_llava", "VideoLlavaMultiModalProjector"),
}
#: the name under which our recording attention is known to transformers
_RECORDING = "holov_export_recording"


class TransformersVision(Protocol):
    """A tower and what projects its rows. Built by `transformers_vision`."""

    def run(self, pixels: PixelBatch) -> VisualTokens:
        """All N tokens of each picture and the saliency that selection reads."""
        ...

    def close(self) -> None:
        """Give the weights' memory back."""
        ...


def transformers_vision(folder: Path, plan: ExportPlan) -> TransformersVision:
    """The tower of a checkpoint that the plan's graph is made of."""
    if isinstance(plan.model.vision, QwenVisionSpec):
        return _QwenVision(folder, plan)
    return _ClipVision(folder, plan)


class _ClipVision:
    """CLIP (eager) and LLaVA's projector."""

    def __init__(self, folder: Path, plan: ExportPlan) -> None:
        torch, transformers = require("torch"), require("transformers")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config.vision_config._attn_implementation = "eager"
        self._spec = plan.model.clip
        # CLS is one of the tokens of a frame
        self._first = 0 if plan.part == "video" and getattr(plan.model.video, "cls", False) else 1
        self._tower: Any = transformers.CLIPVisionModel(config.vision_config).eval().float()
        module, name = _PROJECTORS[plan.model.family]
        self._projector: Any = getattr(require(module), name)(config).eval().float()
        known = dict(self._tower.named_parameters())
        with torch.no_grad():
            for name, tensor in _weights(folder, plan).items():
                if name.startswith("multi_modal_projector."):
                    self._projector.get_parameter(name.removeprefix("multi_modal_projector.")).copy_(tensor)
                    continue
                inner = name.removeprefix("vision_tower.").replace("position_embedding", "position_embedding.weight")
                inner = inner.replace("pre_layernorm", "pre_layrnorm")
                inner = f"encoder.{inner}" if inner.startswith("layers.") else inner
                known[inner if inner in known else f"vision_model.{inner}"].copy_(tensor)

    def run(self, pixels: PixelBatch) -> VisualTokens:
        """See `TransformersVision.run`."""
        torch = require("torch")
        layer = self._spec.feature_layer
        with torch.inference_mode():
            out = self._tower(torch.from_numpy(pixels.pixel_values), output_attentions=True, output_hidden_states=True)
            rows = self._projector(out.hidden_states[layer + 1][:, self._first :])
            saliency = out.attentions[layer][:, :, 0, self._first :].mean(1)
        if pixels.layouts:
            return _of_pictures(rows.flatten(0, 1).numpy(), saliency.flatten().numpy(), pixels.layouts)
        batch, count = rows.shape[0], rows.shape[1]
        positions = np.broadcast_to(np.arange(count, dtype=np.int64), (batch, count))
        return VisualTokens(rows.numpy(), positions, np.full(batch, count, np.int64), saliency.numpy())

    def close(self) -> None:
        """See `TransformersVision.close`."""
        from holov_export.vision.loading import forget_weights

        forget_weights(self._tower)
        forget_weights(self._projector)


class _QwenVision:
    """Qwen2.5-VL's tower (eager) and merger."""

    def __init__(self, folder: Path, plan: ExportPlan) -> None:
        torch, transformers = require("torch"), require("transformers")
        qwen = require("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
        assert isinstance(plan.model.vision, QwenVisionSpec)  # transformers_vision asks
        self._spec = plan.model.vision
        self._received: list[Any] = []
        transformers.AttentionInterface.register(_RECORDING, self._recording(qwen.eager_attention_forward))
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).vision_config
        config._attn_implementation = _RECORDING
        self._tower: Any = qwen.Qwen2_5_VisionTransformerPretrainedModel(config).eval().float()
        with torch.no_grad():
            for name, tensor in _weights(folder, plan).items():
                parameter = self._tower.get_parameter(name.removeprefix("visual."))
                parameter.copy_(tensor.reshape(parameter.shape))

    def _recording(self, eager: Any) -> Any:
        """transformers' eager attention, which also notes what each key of the last block receives."""

        def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any) -> Any:
            out, weights = eager(module, query, key, value, attention_mask, **settings)
            if module is self._tower.blocks[-1].attn:
                self._received.append(weights[0].mean((0, 1)))
            return out, weights

        return attend

    def run(self, pixels: PixelBatch) -> VisualTokens:
        """See `TransformersVision.run`. The patches go in as a raster: transformers puts them into windows itself."""
        torch, unit = require("torch"), self._spec.unit
        values, grids, start = [], [], 0
        for layout in pixels.layouts:
            own = pixels.pixel_values[start : start + layout.rows].reshape(-1, unit, self._spec.patch_values)
            values.append(own[layout.source].reshape(-1, self._spec.patch_values))
            down, across = (side * self._spec.merge for side in layout.regions[0].grid)
            grids.append((len(layout.regions), down, across))
            start += layout.rows
        self._received.clear()
        with torch.inference_mode():
            made = self._tower(torch.from_numpy(np.concatenate(values)), grid_thw=torch.tensor(grids))
            by_window = torch.cat(self._received).unflatten(0, (-1, unit)).mean(1).numpy()
        rows = _of_pictures(made.pooler_output.numpy(), None, pixels.layouts, raster=True)
        saliency = _of_pictures(by_window[:, None], None, pixels.layouts).tokens[:, :, 0]
        for image, layout in enumerate(pixels.layouts):
            saliency[image, layout.tokens :] = -1.0
        return VisualTokens(rows.tokens, rows.positions, rows.counts, saliency)

    def close(self) -> None:
        """See `TransformersVision.close`."""
        from holov_export.vision.loading import forget_weights

        forget_weights(self._tower)


def _weights(folder: Path, plan: ExportPlan) -> dict[str, torch.Tensor]:
    """Our names of the tower's parameters -> the checkpoint's tensors in float32, in the shapes of the checkpoint."""
    from holov_export.vision.families import FAMILIES, checkpoint_names
    from holov_export.vision.weights import SafetensorsReader

    torch, family = require("torch"), plan.model.family
    with torch.device("meta"):
        plain = plan.model_copy(update={"policy": NoSelection(), "cuts": ()})
        names = [name for name, _ in FAMILIES[family].build(plain).named_parameters()]
    with SafetensorsReader(folder) as reader:
        return {name: reader.read(checkpoint_names(family, plan.part, name)).to(torch.float32) for name in names}


def _of_pictures(
    rows: FloatArray, saliency: FloatArray | None, layouts: tuple[ImageLayout, ...], *, raster: bool = False
) -> VisualTokens:
    """Rows of all views -> those of each picture's tokens, zero (saliency -1) where it has no more.

    Args:
        rows: float [R, D] in the tower's order, or with `raster` in the order of the tokens.
        saliency: float [R] or None.
    """
    longest = max(layout.tokens for layout in layouts)
    tokens = np.zeros((len(layouts), longest, rows.shape[1]), dtype=np.float32)
    positions = np.full((len(layouts), longest), -1, dtype=np.int64)
    marks = np.full((len(layouts), longest), -1.0, dtype=np.float32)
    start = 0
    for image, layout in enumerate(layouts):
        own = np.arange(layout.tokens) if raster else layout.source
        tokens[image, : layout.tokens] = rows[start + own]
        positions[image, : layout.tokens] = np.arange(layout.tokens)
        if saliency is not None:
            marks[image, : layout.tokens] = saliency[start + own]
        start += layout.tower_rows
    counts = np.array([layout.tokens for layout in layouts], dtype=np.int64)
    return VisualTokens(tokens, positions, counts, None if saliency is None else marks)
