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
