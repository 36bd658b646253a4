"""Calibration recipes: which pictures the ranges of a quantised graph come from, how, and what it may lose.

A recipe is a TOML file: one of `calibration/` (`--recipe smoke-8`), or the user's own (`--recipe ./my.toml`).
`calibration/README.md` says how to write one; `calibration/recipe.schema.json` lets editors complete and check it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from holov_export.policies import Frozen

Algorithm = Literal["minmax", "percentile", "entropy"]
_SHA256 = r"^[0-9a-f]{64}$"


class PictureFile(Frozen):
    """One picture of a recipe that names its pictures.

    Attributes:
        package: a Python module that ships it; None for a file of the folder that the user names.
        file: path inside that package or folder, forward slashes.
        sha256: of the file; None only where nobody could compute it (see `Recipe.source`).
        licence: under which it may be used. credit: whom to name, and where it comes from.
    """

    package: str | None = None
    file: str
    sha256: str | None = Field(default=None, pattern=_SHA256)
    licence: str
    credit: str = ""


class Limits(Frozen):
    """What a quantised graph may lose on the pictures that it is judged by, against the same graph before.

    Attributes:
        overlap: smallest share of kept positions in common, over all pictures and judged budgets.
        cosine: smallest cosine between the rows of a position that both kept.
        answers: smallest share of answers that stay the same, where a decoder and questions are at hand.
    """

    overlap: float = Field(default=0.97, ge=0, le=1)
    cosine: float = Field(default=0.999, ge=-1, le=1)
    answers: float = Field(default=0.98, ge=0, le=1)


class FolderPictures(Frozen):
    """Pictures of a folder that the user names: `count` of them for the ranges, `judge` others to judge by.

    Which ones is decided by the seed and the names, so that the same folder gives the same pictures.
    """

    count: int = Field(default=64, ge=1)
    judge: int = Field(default=16, ge=1)


class Recipe(Frozen):
    """A calibration.

    Attributes:
        name, title: for programs, for people.
        source: "packages" are files of installed Python packages, "folder" whatever the user's folder holds, "files"
            named files of the user's folder.
        calibrate: pictures that ranges are collected on; judge: others, for the gate. Empty for "folder".
        folder: how many, for "folder" only.
        seed: of what is drawn.
        algorithm: "minmax"; "percentile" cuts `percentile` of a tensor's values in two-sided shares; "entropy" searches
            the range whose histogram, rounded to 8 bits, differs least by KL divergence.
        percentile: 99.99 leaves out one value in ten thousand.
        budgets: the graph is run at these while ranges are collected: numbers, shares of N such as "1/9", or "all".
        smoothing: see `Quantization`; None for none.
        keep: parts of weight names that are never quantised; see `quantize.linears.matches`.
        limits: of the gate.
        sources: where constants come from, one line each.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str
    source: Literal["packages", "folder", "files"]
    calibrate: tuple[PictureFile, ...] = ()
    judge: tuple[PictureFile, ...] = ()
    folder: FolderPictures | None = None
    seed: int = 0
    algorithm: Algorithm = "minmax"
    percentile: float = Field(default=99.99, gt=50, lt=100)
    budgets: tuple[int | str, ...] = ("1/9", "all")
    smoothing: float | None = Field(default=None, gt=0, lt=1)
    keep: tuple[str, ...] = ()
    limits: Limits = Limits()
    sources: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        named = bool(self.calibrate or self.judge)
        if (self.source == "folder") != (self.folder is not None) or (self.source == "folder") == named:
            raise ValueError('"folder" has a [folder] table and names no pictures; the others name theirs')
        if named and not (self.calibrate and self.judge):
            raise ValueError("a recipe names pictures to calibrate with and others to judge by")
        return self
