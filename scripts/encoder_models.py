"""The true-size LLaVA-1.5 vision encoder in transformers' own classes with random weights, for the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from holov_export.spec import DecoderSpec, ImageSpec, ModelSpec, PromptSpec, VisionSpec

#: of LLaVA-1.5-7B's language model
WIDTH = 4096
#: random weights attend evenly to everything; a trained CLS token does not, and quotas should differ between crops
PEAKINESS = 10.0


def spec_of_size(layers: int) -> ModelSpec:
    """LLaVA-1.5-7B's vision side; `layers` of 24 for quick runs (the feature layer stays the last but one)."""
    vision = VisionSpec(
        image_size=336,
        patch_size=14,
        width=1024,
        layers=layers,
        heads=16,
        mlp_width=4096,
        activation="quick_gelu",
        layer_norm_eps=1e-5,
        feature_layer=layers - 2,
        projector_activation="gelu",
        projector_bias=True,
    )
    decoder = DecoderSpec(
        architecture="llama",
        width=WIDTH,
        layers=32,
        heads=32,
        kv_heads=32,
        head_width=128,
        mlp_width=11008,
        vocab_size=32064,
        context=4096,
        image_token_id=32000,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=32001,
    )
    image = ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    prompt = PromptSpec(chat_template="")
    return ModelSpec(family="llava", name="random", image=image, vision=vision, decoder=decoder, prompt=prompt)


def transformers_models(spec: ModelSpec, outliers: float = 1.0) -> tuple[Any, Any, Any]:
    """(eager tower, SDPA tower over the same weights, projector), random but seeded.

    With `outliers` the norms of all layers multiply six channels by it, the same ones, as trained towers have some.

    Each tower has its own configuration: transformers reads the kind of attention from it at run time.
    """
    vision = spec.vision
    sizes: dict[str, Any] = {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "projection_dim": 768,
    }
    tower: Any = CLIPVisionModel  # typed loosely in transformers
    config: Any = CLIPVisionConfig
    torch.manual_seed(0)
    eager = tower(config(**sizes, attn_implementation="eager")).eval().requires_grad_(False)
    for name, parameter in eager.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.mul_(PEAKINESS)
    loud = torch.randperm(vision.width, generator=torch.Generator().manual_seed(1))[:6]
    for name, parameter in eager.named_parameters():
        if "layer_norm" in name and name.endswith("weight"):
            parameter[loud] *= outliers
    with torch.device("meta"):
        sdpa = tower(config(**sizes, attn_implementation="sdpa")).eval()
    sdpa.load_state_dict(eager.state_dict(), assign=True)
    for name, buffer in eager.named_buffers():  # position_ids is not among the saved tensors
        module, _, leaf = name.rpartition(".")
        sdpa.get_submodule(module).register_buffer(leaf, buffer, persistent=False)
    heads = {"num_attention_heads": spec.decoder.heads, "num_key_value_heads": spec.decoder.kv_heads}
    text = {"model_type": "llama", "hidden_size": spec.decoder.width, **heads}
    full = LlavaConfig(vision_config=config(**sizes), text_config=text)
    projector = LlavaMultiModalProjector(full).eval().requires_grad_(False)
    used = [module.config._attn_implementation for module in (eager, sdpa)]
    assert used == ["eager", "sdpa"], used
    return eager, sdpa.requires_grad_(False), projector


@dataclass
class WeightsInMemory:
    """Stands in for a SafetensorsReader: hands out transformers' own parameters, shared and not copied."""

    tensors: dict[str, Tensor]

    @classmethod
    def from_models(cls, tower: Any, projector: Any) -> WeightsInMemory:
        tensors = {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}
        tensors.update({f"multi_modal_projector.{name}": value for name, value in projector.state_dict().items()})
        return cls(tensors)

    def read(self, names: Iterable[str]) -> Tensor:
        return next(self.tensors[name] for name in names if name in self.tensors)
