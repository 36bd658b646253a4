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


class ExportPlan(Frozen):
    """Everything an export will do, resolved before it does anything. `--dry-run` prints it.

    Attributes:
        policy, cuts: of the graph that runs unless another one is asked for; see `GraphPlan`.
        also: further graphs over the same weights.
        budget: tokens of an image when none is asked for; None for a ninth of N.
        precision: of the vision graphs. decoder: precision of the embedded decoder, or None to leave it out.
        decoder_provider: execution provider that the decoder's graph is built for; a runtime may choose another.
        opset: of the vision graph, asserted after export.
    """

    model: ModelSpec
    source: CheckpointSource
    policy: SelectionPolicy
    cuts: tuple[Cut, ...] = ()
    also: tuple[GraphPlan, ...] = ()
    budget: int | None = Field(default=None, ge=1)
    precision: Precision
    decoder: DecoderPrecision | None
    decoder_provider: Literal["cpu", "cuda"] = "cpu"
    opset: int = 18

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

    def of_graph(self, graph: GraphPlan) -> ExportPlan:
        """The plan of a bundle that holds only `graph`."""
        return self.model_copy(update={"policy": graph.policy, "cuts": graph.cuts, "also": ()})

    @field_validator("opset")
    @classmethod
    def _known_opset(cls, opset: int) -> int:
        if not 17 <= opset <= 24:
            raise ValueError(f"opset {opset} is outside 17..24")
        return opset
