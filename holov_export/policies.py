"""Selection policies: what a rule is called, what it reads, and its settings. Plain data, read from manifests.

The rules themselves are in `selection/`; here is what a manifest, a command line and a Jetson know of them.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Frozen(BaseModel):
    """Base of everything that touches disk: immutable, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FeatureSource(str, Enum):
    """What a selection rule reads beside saliency. NONE lets the graph select early (fewer rows in the last layer).

    HIDDEN are the feature layer's rows, PROJECTED the projector's, KEYS the keys of the feature layer's attention, mean
    over its heads.
    """

    NONE = "none"
    HIDDEN = "hidden"
    PROJECTED = "projected"
    KEYS = "keys"


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
        merges: True if tokens that go are averaged into some that stay.
        keeps_cls: True if the CLS token is among the output rows; its position is N, one past the last patch.
        in_tower: True if the rule may decide at an earlier layer than the feature layer.
        reselects: True if it may decide again among the tokens that an earlier cut has left.
        packs: True if it can decide where pictures have unequal numbers of tokens.
        newlines: False if newline embeddings are dropped (LLaVA-NeXT), whatever a plan says.
        spreads: False if the quota of a clip is never shared out over its frames.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    features: ClassVar[FeatureSource] = FeatureSource.NONE
    lossless_at_full: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    keeps_cls: ClassVar[bool] = False
    in_tower: ClassVar[bool] = True
    reselects: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    newlines: ClassVar[bool] = True
    spreads: ClassVar[bool] = True


class HolovPolicy(_Policy):
    """HoloV as it should have shipped: official quotas, overflow goes to other crops, raster order.

    Source: obananas/HoloV llava/model/utils.py@1d2e65e for 16 crops and the quota rule.
    """

    summary: ClassVar[str] = (
        "HoloV quotas by CLS attention per crop; a full crop's surplus goes to other crops; raster order"
    )
    source: ClassVar[str] = "arXiv 2510.02912; quotas as in obananas/HoloV@1d2e65e"
    reselects: ClassVar[bool] = True
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
    in_tower: ClassVar[bool] = False  # its zero rows are for the language model; the tower never saw any
    newlines: ClassVar[bool] = False
    spreads: ClassVar[bool] = False
    method: Literal["holov-official"] = "holov-official"
    crops: int = Field(default=16, ge=1)


class HolovPlusPolicy(_Policy):
    """HoloV's strips and quotas with scores in which features count: attention times what nobody more salient shows.

    A rule of this project; docs/holov-plus.md says how it was found and what it was measured on.
    """

    summary: ClassVar[str] = (
        "HoloV's strips and quotas by attention times novelty: how unlike a token is to all more salient ones; "
        "raster order"
    )
    source: ClassVar[str] = "this project, docs/holov-plus.md; novelty after Science 344:1492 (density peaks)"
    features: ClassVar[FeatureSource] = FeatureSource.HIDDEN
    reselects: ClassVar[bool] = True
    method: Literal["holov-plus"] = "holov-plus"
    crops: int = Field(default=16, ge=1)
    layout: CropLayout = CropLayout.STRIPS


class HolovPaperPolicy(_Policy):
    """Equations 1-5 of the paper: quotas w^tau, top-q by attention plus scaled variance inside a crop.

    `crops` is 16 because the paper's [1024 / budget] would change with a budget that is an input here.
    """

    summary: ClassVar[str] = "the paper's equations 1-5: attention plus feature variance inside each crop; raster order"
    source: ClassVar[str] = "arXiv 2510.02912v2, equations 1-5"
    features: ClassVar[FeatureSource] = FeatureSource.PROJECTED
    in_tower: ClassVar[bool] = False  # the projector reads the feature layer only
    packs: ClassVar[bool] = False  # its crops' matrices are of one size
    method: Literal["holov-paper"] = "holov-paper"
    crops: int = Field(default=16, ge=1)
    layout: CropLayout = CropLayout.TILES
    tau: float = Field(default=1.0, gt=0)


class ScopePolicy(_Policy):
    """SCOPE: greedy coverage of the feature layer's tokens, weighted by saliency to the power of `alpha`."""

    summary: ClassVar[str] = "greedy: what covers most that is not covered yet, times CLS attention; raster order"
    source: ClassVar[str] = "arXiv 2510.24214; kinredon/SCOPE scope/clip_encoder.py"
    features: ClassVar[FeatureSource] = FeatureSource.HIDDEN
    reselects: ClassVar[bool] = True
    method: Literal["scope"] = "scope"
    alpha: float = Field(default=1.0, gt=0)


class DivprunePolicy(_Policy):
    """DivPrune: greedy max-min diversity of the projector's rows, cosine distance; saliency plays no part.

    The published code may take a token twice where tokens are equal; here each is taken once.
    """

    summary: ClassVar[str] = "greedy: the token farthest from all that are kept, whatever its attention; raster order"
    source: ClassVar[str] = "arXiv 2503.02175; vbdi/divprune@799e2d9"
    features: ClassVar[FeatureSource] = FeatureSource.PROJECTED
    in_tower: ClassVar[bool] = False  # the projector reads the feature layer only
    reselects: ClassVar[bool] = True
    method: Literal["divprune"] = "divprune"


class CdprunerUnconditionalPolicy(_Policy):
    """CDPruner without its condition: greedy MAP of the determinantal point process of the projector's rows.

    CDPruner weighs the kernel by each token's relevance to the question, which it takes from CLIP's text tower. A LLaVA
    checkpoint has no text tower and the vision graph sees no text, so all relevances are equal here. Then any token is
    as good as a first one, and the lowest position is taken.
    """

    summary: ClassVar[str] = (
        "greedy: the token that the span of the kept ones leaves most of (DPP); CDPruner with no question; raster order"
    )
    source: ClassVar[str] = "arXiv 2506.10967, all relevances equal; Theia-4869/CDPruner@9541616"
    features: ClassVar[FeatureSource] = FeatureSource.PROJECTED
    in_tower: ClassVar[bool] = False  # the projector reads the feature layer only
    reselects: ClassVar[bool] = True
    method: Literal["cdpruner-unconditional"] = "cdpruner-unconditional"


class DartPolicy(_Policy):
    """DART on the projector's rows, as TensorRT Edge-LLM ships it: pivots by L1 norm, then what is least like them.

    DART itself decides in the language model, after its second layer, by keys; Edge-LLM moved it to the embeddings.
    Edge-LLM has four pivots of the text beside `pivots` of the image; the vision graph sees no text, so it has none.
    Edge-LLM prunes nothing of requests with fewer than 16 visual tokens; here every budget is met.
    """

    summary: ClassVar[str] = "pivots of the largest L1 norm and the tokens least similar to them; raster order"
    source: ClassVar[str] = "arXiv 2502.11494; NVIDIA/TensorRT-Edge-LLM 0.11, without text pivots"
    features: ClassVar[FeatureSource] = FeatureSource.PROJECTED
    in_tower: ClassVar[bool] = False  # the projector reads the feature layer only
    reselects: ClassVar[bool] = True
    method: Literal["dart"] = "dart"
    pivots: int = Field(default=4, ge=1, le=16)


class VisionzipPolicy(_Policy):
    """VisionZip: dominant tokens by CLS attention, the CLS token among them; the rest merged into contextual rows.

    `contextual` rows of each 32 are contextual: 5, which is the published 10 of 64, 20 of 128 and 30 of 192. The rows
    are the CLS token, the dominant tokens in raster order, the contextual ones in raster order.
    """

    summary: ClassVar[str] = "CLS token and top CLS attention, then contextual rows that the rest is averaged into"
    source: ClassVar[str] = "arXiv 2412.04467; dvlab-research/VisionZip@3151f6d"
    features: ClassVar[FeatureSource] = FeatureSource.KEYS
    lossless_at_full: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    keeps_cls: ClassVar[bool] = True
    in_tower: ClassVar[bool] = False  # its rows are made for the language model
    packs: ClassVar[bool] = False  # a picture of several views has several CLS tokens
    method: Literal["visionzip"] = "visionzip"
    contextual: int = Field(default=5, ge=0, le=31)


class ClsTopkPolicy(_Policy):
    """The tokens that the CLS token attends to most, in raster order: the baseline to beat."""

    summary: ClassVar[str] = "the tokens with the highest CLS attention; raster order"
    source: ClassVar[str] = "the common baseline (FasterVLM, VisionZip's dominant tokens)"
    reselects: ClassVar[bool] = True
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
    | HolovPlusPolicy
    | ScopePolicy
    | DivprunePolicy
    | CdprunerUnconditionalPolicy
    | DartPolicy
    | VisionzipPolicy
    | ClsTopkPolicy
    | UniformPolicy
    | RandomPolicy
    | NoSelection,
    Field(discriminator="method"),
]

#: method name -> policy class, in the order `holov-export methods` lists them
POLICIES: dict[str, type[_Policy]] = {
    "holov": HolovPolicy,
    "holov-plus": HolovPlusPolicy,
    "holov-official": HolovOfficialPolicy,
    "holov-paper": HolovPaperPolicy,
    "scope": ScopePolicy,
    "divprune": DivprunePolicy,
    "cdpruner-unconditional": CdprunerUnconditionalPolicy,
    "dart": DartPolicy,
    "visionzip": VisionzipPolicy,
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
