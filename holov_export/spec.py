"""Plain data that says what a model is, how tokens are selected, and what an export will do.

Everything here is a frozen pydantic model that forbids unknown fields, because it is written to and read from
manifests. It imports neither torch nor onnx: a Jetson reads the same words.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from holov_export.policies import Frozen, SelectionPolicy


class Precision(str, Enum):
    """Element type of weights and activations. What decides which tokens stay is float32 in all of them."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> str:
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.value]


class DecoderPrecision(str, Enum):
    """Element type of the decoder's weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT4 = "int4"


class ImageSpec(Frozen):
    """How a picture becomes pixels, in the order of Hugging Face's CLIP image processor.

    Attributes:
        pad_to_square: pad the longer side's square with the mean colour before resizing.
        shortest_edge: resize so that the shorter side has this length; None if `resize_to` is given or no resize.
        resize_to: (height, width) to resize to, whatever the aspect ratio.
        crop: (height, width) of the centre crop, zero padded where the picture is smaller; None for no crop.
        resample: Pillow filter.
        rescale_factor: pixel values are multiplied by it (1/255).
        mean, std: per channel, applied after rescaling.
    """

    pad_to_square: bool = False
    shortest_edge: int | None = Field(default=None, ge=1)
    resize_to: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class VisionSpec(Frozen):
    """A CLIP vision tower and its projector.

    Attributes:
        image_size, patch_size: pixels.
        width, layers, heads, mlp_width: of the tower as trained (layers that selection does not need are not exported).
        feature_layer: 0-based index of the last encoder layer whose output the projector reads
            (`vision_feature_layer` -2 of 24 layers is index 22). Its CLS attention row is the saliency.
        activation, projector_activation: names of transformers' activations.
    """

    architecture: Literal["clip"] = "clip"
    image_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    channels: int = 3
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
    layer_norm_eps: float
    feature_layer: int = Field(ge=0)
    projector_activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
    projector_bias: bool

    @model_validator(mode="after")
    def _consistent(self) -> VisionSpec:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.feature_layer >= self.layers:
            raise ValueError(f"feature_layer {self.feature_layer} is past the last of {self.layers} layers")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """N: patch tokens of one picture."""
        rows, columns = self.grid
        return rows * columns


class DecoderSpec(Frozen):
    """The language model, as far as a runtime must know it.

    Attributes:
        width: D. heads, kv_heads, head_width: of its attention. mlp_width: of its gated MLP.
        context: longest sequence. image_token_id: the placeholder in `input_ids`.
    """

    architecture: str
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_width: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    context: int = Field(ge=1)
    image_token_id: int = Field(ge=0)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


class PromptSpec(Frozen):
    """How a question becomes text: the model's own Jinja chat template and the text of the image placeholder."""

    chat_template: str
    image_placeholder: str = "<image>"


class ModelSpec(Frozen):
    """A vision-language model: five parts, no optional ones."""

    family: Literal["llava"]
    name: str
    image: ImageSpec
    vision: VisionSpec
    decoder: DecoderSpec
    prompt: PromptSpec


class CheckpointSource(Frozen):
    """Where the weights came from, without any local path.

    Attributes:
        kind: "hub" (a pinned revision), "local" (a directory) or "bundled" (ships in the wheel).
        name: repository id, or the directory's own name.
        revision: full commit of a hub repository.
        config_sha256: of config.json as read.
    """

    kind: Literal["hub", "local", "bundled"]
    name: str
    revision: str | None = None
    config_sha256: str = ""


#: the opset each precision is exported at: 18 is what TensorRT 10 reads everywhere; Conv takes bfloat16 from 22 on
OPSETS = {Precision.FP32: 18, Precision.FP16: 18, Precision.BF16: 22}


class ExportPlan(Frozen):
    """Everything an export will do, resolved before it does anything. `--dry-run` prints it.

    Attributes:
        precision: of the vision graph. decoder: precision of the embedded decoder, or None to leave it out.
        decoder_provider: execution provider that the decoder's graph is built for; a runtime may choose another.
        opset: of the vision graph, asserted after export.
    """

    model: ModelSpec
    source: CheckpointSource
    policy: SelectionPolicy
    precision: Precision
    decoder: DecoderPrecision | None
    decoder_provider: Literal["cpu", "cuda"] = "cpu"
    opset: int = 18

    @field_validator("opset")
    @classmethod
    def _known_opset(cls, opset: int) -> int:
        if not 17 <= opset <= 24:
            raise ValueError(f"opset {opset} is outside 17..24")
        return opset
