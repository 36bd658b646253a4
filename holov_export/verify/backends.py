"""The back ends that a bundle's vision graph is compared with: our torch module, the reference loops, transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holov_export.extras import require
from holov_export.selection.reference import positions_of
from holov_export.spec import ExportPlan, ModelSpec, Precision
from holov_export.tensors import FloatArray, PixelBatch, VisualTokens
from holov_export.verify.parity import positions_only

if TYPE_CHECKING:
    import torch

    from holov_export.vision.clip import LlavaVision


def tokens_from_torch(module: LlavaVision, pixels: PixelBatch, budget: int, quota: list[int]) -> VisualTokens:
    """Run the torch module, in its own precision, as the graph would be run."""
    torch = require("torch")
    dtype = next(module.parameters()).dtype
    with torch.inference_mode():
        tokens, positions, counts, saliency = module(
            torch.from_numpy(pixels.pixel_values).to(dtype), torch.tensor([budget]), torch.tensor(quota)
        )
    return VisualTokens(tokens.float().numpy(), positions.numpy(), counts.numpy(), saliency.numpy())


def features_from_torch(module: LlavaVision, pixels: PixelBatch) -> FloatArray:
    """float32 [B, N, ..]: what the module's rule reads beside saliency, two pictures at a time."""
    torch = require("torch")
    dtype, parts = next(module.parameters()).dtype, []
    with torch.inference_mode():
        for pair in torch.from_numpy(pixels.pixel_values).to(dtype).split(2):
            parts.append(module.features_of(pair).numpy())
    return np.concatenate(parts)


def tokens_from_reference(
    plan: ExportPlan, seen: VisualTokens, budget: int, quota: list[int], features: FloatArray | None = None
) -> VisualTokens:
    """What the reference loops keep, given another back end's saliency (and [B, N, D] features, if the rule reads any).

    Positions only: the result's `tokens` have width 0.
    """
    assert seen.saliency is not None  # every comparison asks for it
    kept = [
        positions_of(
            plan.policy,
            seen.saliency[image],
            quota[image],
            plan.model.vision.grid,
            None if features is None else features[image],
        )
        for image in range(len(seen))
    ]
    return positions_only(kept, budget)


class TransformersVision:
    """transformers' own CLIP tower (eager, all attention maps) and LLaVA projector; the language model is not loaded.

    Float32, whatever the checkpoint stores.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        from holov_export.vision.clip import LlavaVision, checkpoint_names
        from holov_export.vision.weights import SafetensorsReader

        torch, transformers = require("torch"), require("transformers")
        config = transformers.LlavaConfig.from_pretrained(folder)
        config.vision_config._attn_implementation = "eager"
        self._spec = spec
        self._tower: Any = transformers.CLIPVisionModel(config.vision_config).eval().float()
        projector = require("transformers.models.llava.modeling_llava").LlavaMultiModalProjector
        self._projector: Any = projector(config).eval().float()
        with SafetensorsReader(folder) as reader:
            ours = [name for name, _ in _names_of(LlavaVision, spec)]
            weights = {name: reader.read(checkpoint_names(name)).to(torch.float32) for name in ours}
        _fill(self._tower, self._projector, weights)

    def run(self, pixels: PixelBatch) -> VisualTokens:
        """All N tokens of each picture and the saliency that selection reads."""
        torch = require("torch")
        layer = self._spec.vision.feature_layer
        with torch.inference_mode():
            out = self._tower(torch.from_numpy(pixels.pixel_values), output_attentions=True, output_hidden_states=True)
            tokens = self._projector(out.hidden_states[layer + 1][:, 1:])
            saliency = out.attentions[layer][:, :, 0, 1:].mean(1)
        batch, count = tokens.shape[0], tokens.shape[1]
        positions = np.broadcast_to(np.arange(count, dtype=np.int64), (batch, count))
        return VisualTokens(tokens.numpy(), positions, np.full(batch, count, np.int64), saliency.numpy())

    def close(self) -> None:
        """Give the weights' memory back."""
        from holov_export.vision.clip import forget_weights

        forget_weights(self._tower)
        forget_weights(self._projector)


def _names_of(module_type: Any, spec: ModelSpec) -> list[tuple[str, torch.nn.Parameter]]:
    from holov_export.policies import ClsTopkPolicy

    torch = require("torch")
    with torch.device("meta"):
        return list(module_type(spec, ClsTopkPolicy()).named_parameters())


def _fill(tower: Any, projector: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights named as ours into transformers' modules, whose names differ by version."""
    torch = require("torch")
    known = dict(tower.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if name.startswith("multi_modal_projector."):
                projector.get_parameter(name.removeprefix("multi_modal_projector.")).copy_(tensor)
                continue
            inner = name.removeprefix("vision_tower.").replace("position_embedding", "position_embedding.weight")
            inner = inner.replace("pre_layernorm", "pre_layrnorm")
            inner = f"encoder.{inner}" if inner.startswith("layers.") else inner
            known[inner if inner in known else f"vision_model.{inner}"].copy_(tensor)


def gathered(full: VisualTokens, kept: VisualTokens) -> VisualTokens:
    """The rows of `full` (all N) at the positions that `kept` keeps; zero rows stay zero."""
    index = np.maximum(kept.positions, 0)
    tokens = np.take_along_axis(full.tokens, index[..., None], axis=1)
    tokens = np.where(kept.positions[..., None] >= 0, tokens, 0)
    return VisualTokens(tokens, kept.positions, kept.counts, full.saliency)


#: precisions that ONNX Runtime's CPU provider can run (it has no bfloat16 convolution)
CPU_PRECISIONS = (Precision.FP32, Precision.FP16)
