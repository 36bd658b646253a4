"""What an estimate must know of a model: widths and numbers of layers, nothing of its weights."""

from __future__ import annotations

from typing import Literal

from PIL import Image
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
from holov_export.runtime.preprocess import MAX_PIXELS
from holov_export.runtime.preprocess_patches import patch_size_of
from holov_export.runtime.preprocess_tiles import pixels_in_tiles
from holov_export.spec import Cut, FramesSpec, ImageSpec, ModelSpec, PatchImageSpec, QwenVisionSpec, TiledImageSpec


class VisionShape(Frozen):
    """A vision transformer and what projects its rows to the language model's width.

    Attributes:
        tokens: N, rows for the language model without selection. patches_per_token: patches that one of them is merged
            from (1 in CLIP, 4 in Qwen3-VL). extra_tokens: rows of the tower beside the patches (1 for CLS), that are no
            tokens.
        views, view_rows: tiles, frames or pictures that the tower sees one by one, and the rows of each; 0 rows for one
            view of all tokens.
        window_rows, full_layers: rows of the windows that all but so many layers attend to; 0 for whole views always.
        width, layers, heads, mlp_width: of the layers that run (those that nothing reads are not exported).
        mlp_matrices: 2, or 3 where the MLP is gated. learned_positions: each row of a view has an embedding of its own.
        patch_values: numbers in one patch.
        projector_inner: width between the projector's two matrices. projectors: how many run (DeepStack has several).
        selects_early: the last layer and the projector run for K rows only (docs/architecture.md).
        attends_all: the last layer's attention and output projection run for all rows nevertheless, and only what is
            behind them for K (packed graphs; that Qwen2.5-VL projects K rows only is not counted).
        projects_kept: the last layer runs for all rows, the projector for K. greedy: K steps in a loop choose the rows.
        cuts: earlier layers at which rows go; empty for the last layer alone.
    """

    tokens: int = Field(ge=1)
    patches_per_token: int = Field(default=1, ge=1)
    extra_tokens: int = Field(default=0, ge=0)
    views: int = Field(default=1, ge=1)
    view_rows: int = Field(default=0, ge=0)
    window_rows: int = Field(default=0, ge=0)
    full_layers: int = Field(default=0, ge=0)
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    mlp_matrices: int = Field(default=2, ge=2, le=3)
    learned_positions: bool = True
    patch_values: int = Field(ge=1)
    projector_inner: int = Field(ge=1)
    projectors: int = Field(default=1, ge=1)
    selects_early: bool = False
    attends_all: bool = False
    projects_kept: bool = False
    greedy: bool = False
    cuts: tuple[Cut, ...] = ()

    @property
    def rows(self) -> int:
        """T: rows of all views, which the layers before the last run for."""
        return self.views * self.rows_of_view

    @property
    def rows_of_view(self) -> int:
        return self.view_rows or self.tokens * self.patches_per_token + self.extra_tokens

    @property
    def projectable(self) -> int:
        """Tokens that the tower makes; more than N where a mosaic of tiles shows padding."""
        return self.views * (self.rows_of_view - self.extra_tokens) // self.patches_per_token


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
        layer = vision.width * (4 * vision.width + vision.mlp_matrices * vision.mlp_width)
        merged = vision.width * vision.patches_per_token
        projector = vision.projector_inner * (merged + self.decoder.width)
        patches = vision.patch_values + (vision.rows_of_view if vision.learned_positions else 0)
        return vision.layers * layer + vision.projectors * projector + patches * vision.width


def shape_from_spec(
    spec: ModelSpec,
    policy: SelectionPolicy,
    cuts: tuple[Cut, ...] = (),
    *,
    size: tuple[int, int] | None = None,
    part: Literal["image", "video"] = "image",
) -> ModelShape:
    """The shape of the graph that an export of `spec` with `policy` and `cuts` has.

    Args:
        size: (width, height) of the picture in pixels, where that decides how many tokens it has; None for the largest.
        part: "video" for a clip.

    Raises:
        UsageError: a size where all pictures are alike, or one that is refused; cuts where they are not alike; or a
            clip of no fixed number of frames.
        ImageError: no picture of that size is taken.
    """
    if part == "video" and not isinstance(spec.video, FramesSpec):
        raise UsageError(f"clips of '{spec.name}' have no fixed number of tokens; only pictures are estimated.")
    if size is not None and (part == "video" or isinstance(spec.image, ImageSpec)):
        tokens = spec.video_tokens if part == "video" else spec.image_tokens
        raise UsageError(f"whatever its size, it has {tokens} tokens in '{spec.name}'.", hint="Leave --size out.")
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise UsageError(f"{size[0]} x {size[1]} pixels are more than {MAX_PIXELS:,}, and would be refused.")
    if isinstance(spec.vision, QwenVisionSpec):
        vision = _qwen_shape(spec, spec.vision, policy, size)
    else:
        vision = _clip_shape(spec, policy, size, part)
    if cuts and vision.attends_all:
        raise UsageError(f"graphs of '{spec.name}' cut at the end of the tower only.")
    decoder = spec.decoder
    return ModelShape(
        name=spec.name,
        vision=vision.model_copy(update={"cuts": cuts}),
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


def _clip_shape(
    spec: ModelSpec, policy: SelectionPolicy, size: tuple[int, int] | None, part: Literal["image", "video"]
) -> VisionShape:
    clip, plain = spec.clip, isinstance(policy, NoSelection)
    tokens, extra, views = clip.tokens, 1, 1
    if part == "video" and isinstance(spec.video, FramesSpec):
        tokens, views, extra = spec.video_tokens, spec.video.frames, 0 if spec.video.cls else 1
    elif isinstance(spec.image, TiledImageSpec):
        height, width = max(spec.image.pinpoints, key=lambda sides: sides[0] * sides[1])
        picture = Image.new("RGB", size or (width, height))
        (layout,) = pixels_in_tiles([picture], spec.image, clip).layouts
        tokens, views = layout.tokens, layout.rows
    packed = part == "video" or isinstance(spec.image, TiledImageSpec)
    return VisionShape(
        tokens=tokens,
        extra_tokens=extra,
        views=views,
        view_rows=clip.tokens + 1 if packed else 0,
        width=clip.width,
        layers=clip.feature_layer + 1,
        heads=clip.heads,
        mlp_width=clip.mlp_width,
        patch_values=clip.channels * clip.patch_size**2,
        projector_inner=spec.decoder.width,
        selects_early=policy.features is FeatureSource.NONE and (packed or not plain),
        attends_all=packed,
        projects_kept=policy.features in (FeatureSource.HIDDEN, FeatureSource.KEYS) or plain,
        greedy=_is_greedy(policy),
    )


def _qwen_shape(
    spec: ModelSpec, vision: QwenVisionSpec, policy: SelectionPolicy, size: tuple[int, int] | None
) -> VisionShape:
    tokens = spec.image_tokens
    if size is not None and isinstance(spec.image, PatchImageSpec):
        width, height = patch_size_of(size, spec.image, (spec.image.min_pixels, spec.image.max_pixels))
        tokens = (width // spec.image.token_pixels) * (height // spec.image.token_pixels)
    return VisionShape(
        tokens=tokens,
        patches_per_token=vision.unit,
        view_rows=tokens * vision.unit,
        window_rows=vision.window_patches,
        full_layers=len(vision.full_layers),
        width=vision.width,
        layers=vision.layers,
        heads=vision.heads,
        mlp_width=vision.mlp_width,
        mlp_matrices=3,
        learned_positions=False,
        patch_values=vision.patch_values,
        projector_inner=vision.width * vision.unit,
        selects_early=policy.features is FeatureSource.NONE and not isinstance(policy, NoSelection),
        attends_all=True,
        greedy=_is_greedy(policy),
    )


def _is_greedy(policy: SelectionPolicy) -> bool:
    return isinstance(policy, ScopePolicy | DivprunePolicy | CdprunerUnconditionalPolicy)


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
