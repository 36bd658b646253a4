"""Plain data that says what a model is, how tokens are selected, and what an export will do.

Everything here is a frozen pydantic model that forbids unknown fields, because it is written to and read from
manifests. It imports neither torch nor onnx: a Jetson reads the same words.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from holov_export.model_spec import (
    DecoderSpec,
    FramePairsSpec,
    FramesSpec,
    ImageSpec,
    ModelSpec,
    NoVideo,
    PatchImageSpec,
    PromptSpec,
    QwenVisionSpec,
    TiledImageSpec,
    VisionSpec,
)
from holov_export.policies import Frozen, HolovOfficialPolicy, SelectionPolicy
from holov_export.signature import TensorSpec, patches_signature, views_signature, vision_signature

__all__ = [
    "OPSETS",
    "QUANTIZED_OPSET",
    "CheckpointSource",
    "Cut",
    "DecoderPrecision",
    "DecoderSpec",
    "ExportPlan",
    "FramePairsSpec",
    "FramesSpec",
    "GraphPlan",
    "ImageSpec",
    "Int4Settings",
    "ModelSpec",
    "NoVideo",
    "PatchImageSpec",
    "Precision",
    "PromptSpec",
    "Quantization",
    "QuantizedType",
    "QwenVisionSpec",
    "TiledImageSpec",
    "VisionSpec",
    "check_cuts",
    "cuts_from_text",
    "graph_name",
    "opset_of",
]


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


#: what a decoder's graph stores keys and values in; "int8" with a scale for each channel of each head
CacheType = Literal["float", "int8"]


class Int4Settings(Frozen):
    """How an int4 decoder's weights were rounded. Nothing else of the decoder is int4.

    Attributes:
        algorithm: "rtn" rounds to nearest; the "k_quant" ones also search scale and zero point, "mixed" and "last"
            leave some layers, or the head alone, in 8 bits; "awq" and "gptq" are the checkpoint's own numbers, made by
            whoever quantised it, and its head in 8 bits.
        block_size: weights that share a scale; of "awq" and "gptq" the checkpoint's.
        accuracy_level: of ONNX Runtime's product, 4 rounds activations to int8 by blocks, 1 leaves them in float32, 0
            leaves it to the provider.
    """

    algorithm: Literal["rtn", "k_quant", "k_quant_mixed", "k_quant_last", "awq", "gptq"] = "rtn"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    accuracy_level: int = Field(default=4, ge=0, le=4)


class QuantizedType(str, Enum):
    """Type of the factors of quantised products: of the weights, and of the activations that meet them."""

    INT8 = "int8"
    FP8 = "fp8"


class Quantization(Frozen):
    """How the products with weights of a vision graph are quantised. What decides which tokens stay never is.

    Attributes:
        type: "fp8" is E4M3.
        engine: what the graph is written for. "tensorrt" has Q/DQ nodes with fixed, symmetric scales, "cpu" is the form
            that ONNX Runtime's CPU provider is fast in.
        recipe, recipe_sha256: the calibration's; empty for "cpu" without smoothing, whose scales are found at run time.
        algorithm: how ranges were found; "" without a calibration.
        smoothing: the share of an outlier channel that moves from the activations to the weights; None for none.
            Source: Xiao et al., SmoothQuant, arXiv 2211.10438, alpha.
        keep: what stays in the bundle's precision: parts of weight names, see `quantize.linears.matches`.
    """

    type: QuantizedType
    engine: Literal["tensorrt", "cpu"] = "tensorrt"
    recipe: str = ""
    recipe_sha256: str = ""
    algorithm: Literal["", "minmax", "percentile", "entropy"] = ""
    smoothing: float | None = Field(default=None, gt=0, lt=1)
    keep: tuple[str, ...] = ()


class Cut(Frozen):
    """One place in the tower where tokens go: the CLS row of a layer's attention decides, the rest runs without them.

    Attributes:
        layer: 0-based index of the encoder layer.
        keep: tokens of a picture that stay, or as many as its quota asks for if that is more; None for the quota
            itself, which is what the last cut keeps.
    """

    layer: int = Field(ge=0)
    keep: int | None = Field(default=None, ge=1)


class GraphPlan(Frozen):
    """One vision graph of a bundle: a rule, and where in the tower it cuts.

    Attributes:
        cuts: in ascending order, the last one at the budget; empty for the usual place, the feature layer.
    """

    policy: SelectionPolicy
    cuts: tuple[Cut, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> GraphPlan:
        check_cuts(self.policy, self.cuts)
        return self

    @property
    def name(self) -> str:
        """What `--method` calls it: "scope", "holov@12", "holov@12:256,22"."""
        return graph_name(self.policy, self.cuts)


def graph_name(policy: SelectionPolicy, cuts: tuple[Cut, ...]) -> str:
    """The rule's name, with `@` and the cuts if they are not the usual one."""
    places = ",".join(f"{cut.layer}" if cut.keep is None else f"{cut.layer}:{cut.keep}" for cut in cuts)
    return f"{policy.method}@{places}" if places else policy.method


def check_cuts(policy: SelectionPolicy, cuts: tuple[Cut, ...]) -> None:
    """Refuse cuts that contradict each other or the rule.

    Raises:
        ValueError: says which.
    """
    layers = [cut.layer for cut in cuts]
    if layers != sorted(set(layers)):
        raise ValueError("the layers of the cuts must rise")
    kept = [cut.keep for cut in cuts[:-1]]
    if None in kept or (cuts and cuts[-1].keep is not None):
        raise ValueError("every cut but the last names how many tokens it keeps; the last keeps the budget")
    if kept != sorted((keep for keep in kept if keep is not None), reverse=True):
        raise ValueError("a later cut cannot keep more tokens than an earlier one")
    if cuts and not policy.in_tower:
        raise ValueError(f"'{policy.method}' decides at the feature layer only")
    if len(cuts) > 1 and not policy.reselects:
        raise ValueError(f"'{policy.method}' decides once; several cuts need a rule that can decide again")


def cuts_from_text(text: str, vision: VisionSpec) -> tuple[tuple[Cut, ...], int | None]:
    """Cuts as a user writes them: "12", "12:256,22", "12:256,22:64".

    Returns:
        (cuts, empty for the usual place; the number behind the last layer, which is the budget when none is asked for).

    Raises:
        ValueError: it does not parse, a layer does not exist or is behind the feature layer, or the number behind the
            last layer is larger than one before.
    """
    cuts: list[Cut] = []
    for part in text.split(","):
        layer, colon, keep = part.strip().partition(":")
        if not layer.isdecimal() or (colon and not keep.isdecimal()):
            raise ValueError(f"'{part.strip()}' is no LAYER or LAYER:TOKENS")
        if int(layer) > vision.feature_layer:
            raise ValueError(f"layer {layer} is behind the feature layer, {vision.feature_layer}")
        if colon and not 1 <= int(keep) <= vision.tokens:
            raise ValueError(f"{keep} tokens are outside 1..{vision.tokens}")
        cuts.append(Cut(layer=int(layer), keep=int(keep) if colon else None))
    budget, last = cuts[-1].keep, Cut(layer=cuts[-1].layer)
    if budget is not None and any(cut.keep is not None and cut.keep < budget for cut in cuts[:-1]):
        raise ValueError("a later cut cannot keep more tokens than an earlier one")
    if len(cuts) == 1 and last.layer == vision.feature_layer:
        return (), budget
    return (*cuts[:-1], last), budget


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


#: Q/DQ nodes with float16 scales, and 8-bit floats, came with this one; what else is in the graph did not change then
QUANTIZED_OPSET = 19


def decoder_name(precision: DecoderPrecision, kv_cache: CacheType) -> str:
    """What people call a decoder's precision: "int4", "fp16, int8 KV"."""
    return precision.value if kv_cache == "float" else f"{precision.value}, {kv_cache} KV"


def opset_of(precision: Precision, quantization: Quantization | None = None) -> int:
    """The opset of a vision graph. An int8 graph whose other values are float32 stays at 18, for TensorRT 8."""
    plain = quantization is None or (quantization.type is QuantizedType.INT8 and precision is Precision.FP32)
    return OPSETS[precision] if plain else max(OPSETS[precision], QUANTIZED_OPSET)


class ExportPlan(Frozen):
    """Everything an export will do, resolved before it does anything. `--dry-run` prints it.

    Attributes:
        policy, cuts: of the graph that runs unless another one is asked for; see `GraphPlan`.
        also: further graphs over the same weights.
        budget: tokens of an image when none is asked for; None for a ninth of N.
        precision: of the vision graphs. decoder: precision of the embedded decoder, or None to leave it out.
        quantization: of the vision graphs; `precision` is then that of all that is not quantised.
        decoder_int4: of an int4 decoder; None for others.
        decoder_kv_cache: what the decoder's graph stores keys and values in, "float" for the type of its activations.
        decoder_provider: execution provider that the decoder's graph is built for; a runtime may choose another.
        opset: of the vision graph, asserted after export.
        newlines: the rows of a picture that keep a token keep their newline embedding (LLaVA-NeXT).
        part: what the vision graph at hand sees. Only a model with two towers has two parts, each with its graphs.
    """

    model: ModelSpec
    source: CheckpointSource
    policy: SelectionPolicy
    cuts: tuple[Cut, ...] = ()
    also: tuple[GraphPlan, ...] = ()
    budget: int | None = Field(default=None, ge=1)
    precision: Precision
    decoder: DecoderPrecision | None
    quantization: Quantization | None = None
    decoder_int4: Int4Settings | None = None
    decoder_kv_cache: CacheType = "float"
    decoder_provider: Literal["cpu", "cuda"] = "cpu"
    opset: int = 18
    newlines: bool = True
    part: Literal["image", "video"] = "image"

    @model_validator(mode="after")
    def _graphs_differ(self) -> ExportPlan:
        check_cuts(self.policy, self.cuts)
        names = [graph.name for graph in self.graphs]
        if len(set(names)) < len(names):
            raise ValueError(f"two graphs have the same name: {', '.join(names)}")
        return self

    @property
    def graphs(self) -> tuple[GraphPlan, ...]:
        """All vision graphs, the default one first."""
        return (GraphPlan(policy=self.policy, cuts=self.cuts), *self.also)

    @property
    def method(self) -> str:
        """The name of the default graph."""
        return graph_name(self.policy, self.cuts)

    @property
    def precision_name(self) -> str:
        """What people call the vision graph's precision: "fp16", "int8", "fp16-int8", "int8-cpu"."""
        if self.quantization is None:
            return self.precision.value
        rest = "" if self.precision is Precision.FP32 else f"{self.precision.value}-"
        written_for = "-cpu" if self.quantization.engine == "cpu" else ""
        return f"{rest}{self.quantization.type.value}{written_for}"

    @property
    def decoder_name(self) -> str:
        """What people call the decoder's precision; "none" without one."""
        return "none" if self.decoder is None else decoder_name(self.decoder, self.decoder_kv_cache)

    @property
    def parts(self) -> tuple[Literal["image", "video"], ...]:
        """What the model has a tower of its own for."""
        return ("image", "video") if self.model.video.kind == "frames" else ("image",)

    def of_part(self, part: Literal["image", "video"]) -> ExportPlan:
        """The plan of the graph that sees pictures, or of the one that sees clips."""
        return self.model_copy(update={"part": part})

    @property
    def packed(self) -> bool:
        """Pictures have unequal numbers of tokens, so the graph is told where each token comes from."""
        return self.part == "video" or self.model.image.kind != "square"

    @property
    def tokens(self) -> int:
        """N: tokens of the largest picture or clip that the graph sees: the largest budget."""
        if self.part == "video":
            return self.model.video_tokens
        return max(self.model.image_tokens, self.model.video_tokens if len(self.parts) == 1 else 0)

    @property
    def signature(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """(inputs, outputs) of the vision graph."""
        vision, width, dtype = self.model.vision, self.model.decoder.width, self.precision.dtype
        if isinstance(vision, QwenVisionSpec):
            return patches_signature(
                patch_values=vision.patch_values, window_patches=vision.window_patches, width=width, dtype=dtype
            )
        if self.packed:
            return views_signature(image_size=vision.image_size, width=width, dtype=dtype)
        return vision_signature(image_size=vision.image_size, tokens=vision.tokens, width=width, dtype=dtype)

    @property
    def keeps_newlines(self) -> bool:
        """Newline embeddings are put behind the rows of a picture."""
        return self.model.image.kind == "tiles" and self.newlines and self.policy.newlines

    @property
    def start_counts(self) -> bool:
        """The rule chooses among the word before a picture as well, as the code published for Qwen2.5-VL does."""
        return self.model.family == "qwen2_5_vl" and isinstance(self.policy, HolovOfficialPolicy)

    def of_graph(self, graph: GraphPlan) -> ExportPlan:
        """The plan of a bundle that holds only `graph`."""
        return self.model_copy(update={"policy": graph.policy, "cuts": graph.cuts, "also": ()})

    @field_validator("opset")
    @classmethod
    def _known_opset(cls, opset: int) -> int:
        if not 17 <= opset <= 24:
            raise ValueError(f"opset {opset} is outside 17..24")
        return opset
