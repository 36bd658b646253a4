"""What an estimate must know of a model: widths and numbers of layers, nothing of its weights."""

from __future__ import annotations

from pydantic import Field, ValidationError

from holov_export.assets import data_folder
from holov_export.errors import UnknownNameError, UsageError
from holov_export.policies import (
    CdprunerUnconditionalPolicy,
    DivprunePolicy,
    FeatureSource,
    Frozen,
    NoSelection,
    ScopePolicy,
    SelectionPolicy,
)
from holov_export.spec import Cut, ModelSpec


class VisionShape(Frozen):
    """A vision transformer and what projects its rows to the language model's width.

    Attributes:
        tokens: N, rows for the language model without selection. patches_per_token: patches that one of them is merged
            from (1 in CLIP, 4 in Qwen3-VL). extra_tokens: rows of the tower beside the patches (1 for CLS).
        width, layers, heads, mlp_width: of the layers that run (those that nothing reads are not exported).
        patch_values: numbers in one patch.
        projector_inner: width between the projector's two matrices. projectors: how many run (DeepStack has several).
        selects_early: the last layer and the projector run for K rows only (docs/architecture.md).
        projects_kept: the last layer runs for all rows, the projector for K. greedy: K steps in a loop choose the rows.
        cuts: earlier layers at which rows go; empty for the last layer alone.
    """

    tokens: int = Field(ge=1)
    patches_per_token: int = Field(default=1, ge=1)
    extra_tokens: int = Field(default=0, ge=0)
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    patch_values: int = Field(ge=1)
    projector_inner: int = Field(ge=1)
    projectors: int = Field(default=1, ge=1)
    selects_early: bool = False
    projects_kept: bool = False
    greedy: bool = False
    cuts: tuple[Cut, ...] = ()

    @property
    def rows(self) -> int:
        """T: rows that the layers before the last run for."""
        return self.tokens * self.patches_per_token + self.extra_tokens


class DecoderShape(Frozen):
    """A LLaMA-like language model: attention with grouped keys and values, gated MLP.

    Attributes:
        context: longest sequence.
        tied: the embedding table is the output matrix as well, and held once. Bundles always hold both.
    """

    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_width: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    context: int = Field(ge=1)
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        """Of one layer: query, keys, values, output, and the three matrices of the MLP."""
        query, pair = self.heads * self.head_width, 2 * self.kv_heads * self.head_width
        return self.width * (2 * query + pair) + 3 * self.width * self.mlp_width


class ModelShape(Frozen):
    """The shape of a vision-language model. `sources` says where its numbers are from."""

    name: str
    vision: VisionShape
    decoder: DecoderShape
    sources: tuple[str, ...]

    @property
    def vision_parameters(self) -> int:
        vision = self.vision
        layer = vision.width * (4 * vision.width + 2 * vision.mlp_width)
        merged = vision.width * vision.patches_per_token
        projector = vision.projector_inner * (merged + self.decoder.width)
        patches = vision.patch_values + vision.rows  # the embedding and its positions
        return vision.layers * layer + vision.projectors * projector + patches * vision.width


def shape_from_spec(spec: ModelSpec, policy: SelectionPolicy, cuts: tuple[Cut, ...] = ()) -> ModelShape:
    """The shape of the graph that an export of `spec` with `policy` and `cuts` has."""
    vision, decoder = spec.vision, spec.decoder
    plain = isinstance(policy, NoSelection)
    return ModelShape(
        name=spec.name,
        vision=VisionShape(
            tokens=vision.tokens,
            extra_tokens=1,
            width=vision.width,
            layers=vision.feature_layer + 1,
            heads=vision.heads,
            mlp_width=vision.mlp_width,
            patch_values=vision.channels * vision.patch_size**2,
            projector_inner=decoder.width,
            selects_early=policy.features is FeatureSource.NONE and not plain,
            projects_kept=policy.features in (FeatureSource.HIDDEN, FeatureSource.KEYS) or plain,
            greedy=isinstance(policy, ScopePolicy | DivprunePolicy | CdprunerUnconditionalPolicy),
            cuts=cuts,
        ),
        decoder=DecoderShape(
            width=decoder.width,
            layers=decoder.layers,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_width=decoder.head_width,
            mlp_width=decoder.mlp_width,
            vocab_size=decoder.vocab_size,
            context=decoder.context,
        ),
        sources=("the model's own configuration",),
    )


def shape_names() -> tuple[str, ...]:
    """Models whose shape ships with the package, so that they can be estimated without a checkpoint."""
    return tuple(sorted(path.stem for path in data_folder("shapes").glob("*.json")))


def shape_from_name(name: str) -> ModelShape:
    """A shape that ships with the package.

    Raises:
        UnknownNameError: there is none of that name.
        UsageError: its file is damaged.
    """
    if name not in shape_names():
        raise UnknownNameError(
            f"no shape of '{name}' ships with the package.", hint=f"Known: {', '.join(shape_names())}."
        )
    path = data_folder("shapes") / f"{name}.json"
    try:
        return ModelShape.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"'{path}' is damaged: {error}") from error
