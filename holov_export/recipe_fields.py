"""Parts of a calibration recipe: pictures, packages and folders that it names, and the limits of the gate."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema

from holov_export.policies import Frozen

_SHA256 = r"^[0-9a-f]{64}$"
_MODULE = r"^[A-Za-z_][A-Za-z0-9_]*$"
#: more pictures than this are a wrong unit
_MOST = 100_000


def _checked_budget(said: object) -> int | str:
    if isinstance(said, int) and not isinstance(said, bool) and said >= 1:
        return said
    if isinstance(said, str) and re.fullmatch(r"all|1/[1-9]\d*", said):
        return said
    raise ValueError('a budget is a positive number of tokens, a share such as "1/9", or "all"')


def _checked_file(said: str) -> str:
    if "\\" in said or any(part in ("", ".", "..") for part in said.split("/")):
        raise ValueError("a file is a path inside its package or folder, with forward slashes and without '..'")
    return said


#: a token budget: a count, a share of the model's N ("1/9"), or all N
Budget = Annotated[
    int | str,
    PlainValidator(_checked_budget),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^(all|1/[1-9]\d*)$"}]}
    ),
]


class PictureFile(Frozen):
    """One picture of a recipe that names its pictures.

    Attributes:
        package: a Python module that ships it; None for a file of the folder that the user names.
        file: path inside that package or folder, forward slashes.
        sha256: of the file; None only where nobody could compute it (see `Recipe.source`).
        licence: under which it may be used; "" for that of the whole recipe.
        credit: whom to name, and where it comes from.
    """

    package: str | None = Field(default=None, pattern=_MODULE, description='module that ships it, "skimage"')
    file: Annotated[str, AfterValidator(_checked_file)] = Field(
        min_length=1, description="path inside the package or folder, forward slashes"
    )
    sha256: str | None = Field(default=None, pattern=_SHA256, description="of the file, in hex")
    licence: str = Field(default="", description="under which it may be used; that of the recipe unless given")
    credit: str = Field(default="", description="whom to name, and where it comes from")

    @property
    def name(self) -> str:
        """For people and records: "skimage/data/astronaut.png", or the path in the folder."""
        return f"{self.package}/{self.file}" if self.package else self.file


class PackageFacts(Frozen):
    """A package that ships pictures: how pip calls it, and the versions that ship these very files."""

    module: str = Field(pattern=_MODULE, description='as in Python, "skimage"')
    pip: str = Field(default="", description='as for pip, "scikit-image"; the module\'s name unless given')
    versions: str = Field(default="", description='those that the hashes were compared with, "0.22.0 to 0.26.0"')

    @property
    def requirement(self) -> str:
        return self.pip or self.module


class FolderPictures(Frozen):
    """Pictures of a folder that the user names: `count` of them for the ranges, `judge` others to judge by.

    Which ones is decided by the seed and the names, so that the same folder gives the same pictures.
    """

    count: int = Field(default=64, ge=1, le=_MOST, description="pictures that ranges are collected on")
    judge: int = Field(default=16, ge=1, le=_MOST, description="others, that the result is judged by")


class Limits(Frozen):
    """What a quantised graph may lose on the pictures that it is judged by, against the same graph before.

    Attributes:
        overlap: smallest share of kept positions in common, over all pictures and judged budgets.
        cosine: smallest cosine between the rows of a position that both kept.
        answers: smallest share of answers that stay the same, where a decoder and questions are at hand.
    """

    overlap: float = Field(default=0.97, ge=0, le=1, description="share of kept positions in common")
    cosine: float = Field(default=0.999, ge=-1, le=1, description="between the rows of a position that both kept")
    answers: float = Field(default=0.98, ge=0, le=1, description="share of answers that stay the same")
