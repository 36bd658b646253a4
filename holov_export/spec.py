"""Plain data that says what a model is, how tokens are selected, and what an export will do.

Everything here is a frozen pydantic model that forbids unknown fields, because it is written to and read from
manifests. It imports neither torch nor onnx: a Jetson reads the same words.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator


class Frozen(BaseModel):
    """Base of everything that touches disk: immutable, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class FeatureSource(str, Enum):
    """What a selection rule reads beside saliency. NONE lets the graph select early (fewer rows in the last layer)."""

    NONE = "none"
    HIDDEN = "hidden"
    PROJECTED = "projected"


class CropLayout(str, Enum):
    """How N tokens are divided into crops: raster strips (published code) or 2-D tiles (the paper's figure 7)."""

    STRIPS = "strips"
    TILES = "tiles"


class _Policy(Frozen):
    """What all selection policies say of themselves.

    Class attributes:
        summary: one line for `holov-export methods`.
        source: where the rule comes from.
        features: what it reads beside saliency.
        lossless_at_full: True if budget N keeps every token.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    features: ClassVar[FeatureSource] = FeatureSource.NONE
    lossless_at_full: ClassVar[bool] = True


class HolovPolicy(_Policy):
    """HoloV as it should have shipped: official quotas, overflow goes to other crops, raster order.

    Source: obananas/HoloV llava/model/utils.py@1d2e65e for 16 crops and the quota rule.
    """

    summary: ClassVar[str] = (
        "HoloV quotas by CLS attention per crop; a full crop's surplus goes to other crops; raster order"
    )
    source: ClassVar[str] = "arXiv 2510.02912; quotas as in obananas/HoloV@1d2e65e"
    method: Literal["holov"] = "holov"
    crops: int = Field(default=16, ge=1)
    layout: CropLayout = CropLayout.STRIPS


class HolovOfficialPolicy(_Policy):
    """The published LLaVA code, bug for bug: lost tokens of a full crop become zero rows at the end."""

    summary: ClassVar[str] = (
        "the published code bug for bug: strips, attention top-k, crop order, overflow as zero rows"
    )
    source: ClassVar[str] = "obananas/HoloV llava/model/utils.py@1d2e65e"
    lossless_at_full: ClassVar[bool] = False
    method: Literal["holov-official"] = "holov-official"
    crops: int = Field(default=16, ge=1)


class HolovPaperPolicy(_Policy):
    """Equations 1-5 of the paper: quotas w^tau, top-q by attention plus scaled variance inside a crop.

    `crops` is 16 because the paper's [1024 / budget] would change with a budget that is an input here.
    """

    summary: ClassVar[str] = "the paper's equations 1-5: attention plus feature variance inside each crop; raster order"
    source: ClassVar[str] = "arXiv 2510.02912v2, equations 1-5"
    features: ClassVar[FeatureSource] = FeatureSource.PROJECTED
    method: Literal["holov-paper"] = "holov-paper"
    crops: int = Field(default=16, ge=1)
    layout: CropLayout = CropLayout.TILES
    tau: float = Field(default=1.0, gt=0)


class ScopePolicy(_Policy):
    """SCOPE: greedy coverage of the feature layer's tokens, weighted by saliency to the power of `alpha`."""

    summary: ClassVar[str] = "greedy: what covers most that is not covered yet, times CLS attention; raster order"
    source: ClassVar[str] = "arXiv 2510.24214; kinredon/SCOPE scope/clip_encoder.py"
    features: ClassVar[FeatureSource] = FeatureSource.HIDDEN
    method: Literal["scope"] = "scope"
    alpha: float = Field(default=1.0, gt=0)


class ClsTopkPolicy(_Policy):
    """The tokens that the CLS token attends to most, in raster order: the baseline to beat."""

    summary: ClassVar[str] = "the tokens with the highest CLS attention; raster order"
    source: ClassVar[str] = "the common baseline (FasterVLM, VisionZip's dominant tokens)"
    method: Literal["cls-topk"] = "cls-topk"


class UniformPolicy(_Policy):
    """Evenly spaced tokens of the raster order; blind to the picture."""

    summary: ClassVar[str] = "evenly spaced tokens of the raster; blind to the picture"
    source: ClassVar[str] = "control"
    method: Literal["uniform"] = "uniform"


class RandomPolicy(_Policy):
    """A random subset drawn once, at export, from `seed`: the same positions for every picture, nested over budgets."""

    summary: ClassVar[str] = "a random subset fixed by a seed at export; the same positions for every picture"
    source: ClassVar[str] = "control"
    method: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)


class NoSelection(_Policy):
    """No rule: all tokens of a plain encoder, the first `budget` of them in raster order. For comparisons only.

    Not in `POLICIES`, because it saves nothing: `verify.baselines` writes such bundles.
    """

    summary: ClassVar[str] = "the plain encoder, for comparisons"
    source: ClassVar[str] = "control"
    method: Literal["none"] = "none"


SelectionPolicy = Annotated[
    HolovPolicy
    | HolovOfficialPolicy
    | HolovPaperPolicy
    | ScopePolicy
    | ClsTopkPolicy
    | UniformPolicy
    | RandomPolicy
    | NoSelection,
    Field(discriminator="method"),
]

#: method name -> policy class, in the order `holov-export methods` lists them
POLICIES: dict[str, type[_Policy]] = {
    "holov": HolovPolicy,
    "holov-official": HolovOfficialPolicy,
    "holov-paper": HolovPaperPolicy,
    "scope": ScopePolicy,
    "cls-topk": ClsTopkPolicy,
    "uniform": UniformPolicy,
    "random": RandomPolicy,
}

_POLICY_ADAPTER: TypeAdapter[SelectionPolicy] = TypeAdapter(SelectionPolicy)


def policy_from_settings(method: str, settings: dict[str, str] | None = None) -> SelectionPolicy:
    """The policy `method` with `settings` over its defaults (`{"crops": "8"}`).

    Raises:
        pydantic.ValidationError: an unknown method, an unknown setting or a value outside its range.
    """
    return _POLICY_ADAPTER.validate_python({"method": method, **(settings or {})})


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
