"""Calibration recipes: which pictures the ranges of a quantised graph come from, how, and what it may lose.

A recipe is a TOML file: one of `calibration/` (`--recipe smoke-8`), or the user's own (`--recipe ./my.toml`).
`calibration/README.md` says how to write one; `calibration/recipe.schema.json` lets editors complete and check it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from holov_export.assets import data_folder
from holov_export.errors import UsageError
from holov_export.policies import Frozen
from holov_export.recipe_fields import Budget, FolderPictures, Limits, PackageFacts, PictureFile
from holov_export.recipe_pictures import (
    NamedPicture,
    RecipePictures,
    check_pictures,
    pictures_in_folder,
    pictures_in_packages,
    pictures_of_files,
)
from holov_export.toml_files import FileKind, names_in, path_from_name, value_from_file

__all__ = [
    "Algorithm",
    "Budget",
    "FolderPictures",
    "Limits",
    "NamedPicture",
    "PackageFacts",
    "PictureFile",
    "Recipe",
    "RecipePictures",
    "list_recipes",
    "pictures_of",
    "recipe_from_file",
    "recipe_from_name",
    "recipe_names",
    "recipe_schema_text",
    "recipe_sha256",
]

Algorithm = Literal["minmax", "percentile", "entropy"]
_KIND = FileKind(noun="recipe", readme="calibration/README.md", own="./my.toml")


class Recipe(Frozen):
    """A calibration.

    Attributes:
        name, title: for programs, for people.
        source: "packages" are files of installed Python packages, "folder" whatever the user's folder holds, "files"
            named files of the user's folder.
        calibrate: pictures that ranges are collected on; judge: others, for the gate. Empty for "folder".
        packages: what is known of those that ship the pictures; for "packages" only.
        folder: how many, for "folder" only.
        fetch: address that the names of "files" are appended to; scripts/fetch_calibration loads them from there.
        licence: of pictures that do not say theirs.
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

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="as in --recipe; the name of the file")
    title: str = Field(min_length=1, description="one line for people")
    source: Literal["packages", "folder", "files"] = Field(
        description='where pictures are: in installed packages, any of the user\'s folder, named "files" of it'
    )
    calibrate: tuple[PictureFile, ...] = ()
    judge: tuple[PictureFile, ...] = ()
    packages: tuple[PackageFacts, ...] = ()
    folder: FolderPictures | None = None
    fetch: str | None = Field(
        default=None, pattern=r"^https?://.+/$", description="address that the names of files are appended to"
    )
    licence: str = Field(default="", description="of pictures that do not say theirs")
    seed: int = Field(default=0, description="of what is drawn")
    algorithm: Algorithm = Field(default="minmax", description="how a tensor's range follows from its values")
    percentile: float = Field(
        default=99.99, gt=50, lt=100, description='of "percentile": 99.99 leaves out one value in ten thousand'
    )
    budgets: tuple[Budget, ...] = Field(
        default=("1/9", "all"), min_length=1, description='token budgets: numbers, shares of N such as "1/9", or "all"'
    )
    smoothing: float | None = Field(
        default=None, gt=0, lt=1, description="share of the outlier channels' size that moves into the weights"
    )
    keep: tuple[str, ...] = Field(default=(), description='parts of weight names that are not quantised, "layers.3"')
    limits: Limits = Limits()
    sources: tuple[str, ...] = Field(default=(), description="where constants come from, one line each")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.source == "folder") != (self.folder is not None):
            raise ValueError('a [folder] table belongs to the source "folder", which needs one')
        if self.source == "folder" and (self.calibrate or self.judge):
            raise ValueError('a recipe of the source "folder" names no pictures')
        if self.source != "folder" and not (self.calibrate and self.judge):
            raise ValueError("a recipe names pictures to calibrate with and others to judge by")
        if self.fetch is not None and self.source != "files":
            raise ValueError('fetch belongs to the source "files"')
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("budgets names one twice")
        return self

    @model_validator(mode="after")
    def _pictures_are_said_well(self) -> Recipe:
        pictures = (*self.calibrate, *self.judge)
        for picture in pictures:
            if (picture.package is not None) != (self.source == "packages"):
                raise ValueError(f'{picture.name}: package belongs to the source "packages", and to all its pictures')
            if picture.sha256 is None and self.source == "packages":
                raise ValueError(f"{picture.name}: sha256 is missing")
            if not (picture.licence or self.licence).strip():
                raise ValueError(f"{picture.name}: neither it nor the recipe names a licence")
        _check_once([picture.name for picture in pictures])
        _check_once([picture.sha256 for picture in pictures if picture.sha256], "the sha256 ")
        _check_once([item.module for item in self.packages])
        idle = {item.module for item in self.packages} - {picture.package for picture in pictures}
        if idle:
            raise ValueError(f"packages names {', '.join(sorted(idle))}, which no picture is from")
        return self


def _check_once(names: Sequence[str], what: str = "") -> None:
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice:
        raise ValueError(f"{what}{twice} is there twice: pictures differ, and those to judge by are others")


# ---------------------------------------------------------------------------------------------------- reading


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that ship with the package, sorted."""
    return names_in(data_folder("calibration"))


def list_recipes() -> tuple[Recipe, ...]:
    """The recipes that ship with the package, sorted by name.

    Raises:
        UsageError: one of their files is damaged.
    """
    return tuple(recipe_from_file(data_folder("calibration") / f"{name}.toml") for name in recipe_names())


def recipe_from_name(name_or_path: str) -> Recipe:
    """The recipe of a `--recipe` value: a name of `calibration/`, or a path that ends in .toml.

    Raises:
        UnknownNameError: no such name or file.
        UsageError: the file does not parse or a value in it is wrong; the message names file, key and line.
        StorageError: the file cannot be read.
    """
    return recipe_from_file(path_from_name(name_or_path, data_folder("calibration"), _KIND))


def recipe_from_file(path: Path) -> Recipe:
    """Read one TOML file; errors as of `recipe_from_name`."""
    return value_from_file(path, Recipe, _KIND)


#: fields that change no range
_WORDS = {"title", "sources", "limits"}


def recipe_sha256(recipe: Recipe) -> str:
    """Hex sha256 of what a recipe does, whatever its file looks like; its title, sources and limits are no part."""
    said = recipe.model_dump(mode="json", exclude=_WORDS)
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_schema_text() -> str:
    """`calibration/recipe.schema.json`: the JSON schema of a recipe file."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**head, **Recipe.model_json_schema()}, indent=2, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------------------------------- pictures


def pictures_of(recipe: Recipe, folder: Path | None) -> RecipePictures:
    """Find a recipe's pictures and check each of them: its hash, that it decodes, that it shows something.

    Args:
        folder: of the user's pictures; None for a recipe that takes its own from packages.

    Raises:
        UsageError: the recipe needs a folder or takes none, or there are too few pictures in it.
        ImageError: a picture is missing, damaged, of a single colour, or there twice.
        MissingExtraError: a package is not installed, or does not ship a picture.
        IntegrityError: a picture differs from its sha256.
        StorageError: something cannot be read.
    """
    if (folder is None) != (recipe.source == "packages"):
        raise UsageError(
            f"the recipe '{recipe.name}' takes its pictures from "
            + ("a folder of yours." if folder is None else "installed packages, not from a folder."),
            hint="Name it: --pictures DIR" if folder is None else "Leave --pictures out, or use --recipe folder.",
        )
    if folder is None:
        found = _split(recipe, pictures_in_packages((*recipe.calibrate, *recipe.judge), recipe.packages, recipe.name))
    elif recipe.folder is not None:
        found = pictures_in_folder(folder, recipe.folder, recipe.seed, recipe.name)
    else:
        found = _split(recipe, pictures_of_files((*recipe.calibrate, *recipe.judge), folder, recipe.name))
    check_pictures(found, recipe.name)
    return found


def _split(recipe: Recipe, pictures: tuple[NamedPicture, ...]) -> RecipePictures:
    return RecipePictures(pictures[: len(recipe.calibrate)], pictures[len(recipe.calibrate) :])
