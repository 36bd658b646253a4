"""Deployment targets: what a board or GPU is, which TensorRT it runs and how an engine for it is built.

A target is a TOML file: one of `engines/` (`--target jetson-agx-orin-64gb`), or the user's own (`--target ./my.toml`).
`engines/README.md` says how to write one; `engines/target.schema.json` lets editors complete and check it.
"""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from holov_export.assets import data_folder
from holov_export.policies import Frozen
from holov_export.toml_files import FileKind, names_in, path_from_name, value_from_file
from holov_export.versions import version_from_text

TargetPrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
TargetKind = Literal["jetson", "datacenter", "workstation"]

#: upper ends that no board comes near: they catch a wrong unit and infinity
_RATE, _SIZE = 100_000, 2**31 - 1
_KIND = FileKind(
    noun="target", readme="engines/README.md", own="./board.toml", lister="`holov-export targets` lists them"
)
_VERSION = r"^\d+(\.\d+){0,3}$"


def _checked_budget(said: object) -> int | str:
    if isinstance(said, int) and not isinstance(said, bool) and said >= 1:
        return said
    if isinstance(said, str) and re.fullmatch(r"all|1/[1-9]\d*", said):
        return said
    raise ValueError('a budget is a positive number of tokens, a share such as "1/9", or "all"')


#: a token budget of a profile: a count, a share of the model's N ("1/9"), or all N
Budget = Annotated[
    int | str,
    PlainValidator(_checked_budget),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^(all|1/[1-9]\d*)$"}]}
    ),
]


class VersionRange(Frozen):
    """Versions from `min` to `max`, both included; "10.3" includes every 10.3.x."""

    min: str = Field(pattern=_VERSION, description='lowest version, for example "8.6"')
    max: str = Field(pattern=_VERSION, description='highest version; "10.3" includes every 10.3.x')

    @model_validator(mode="after")
    def _ordered(self) -> VersionRange:
        if self.lowest > self.highest:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    @property
    def lowest(self) -> tuple[int, ...]:
        return version_from_text(self.min)

    @property
    def highest(self) -> tuple[int, ...]:
        return version_from_text(self.max)

    def holds(self, version: str) -> bool:
        """True if `version` ("10.3.0.30") lies in the range.

        Raises:
            UsageError: `version` is no version number.
        """
        found = version_from_text(version)
        low, high = self.lowest, self.highest
        padded = found + (0,) * (len(low) - len(found))
        return padded >= low and found[: len(high)] <= high

    def __str__(self) -> str:
        return self.min if self.min == self.max else f"{self.min} to {self.max}"


class Rates(Frozen):
    """Peak dense rates of the GPU alone, TFLOP/s (TOPS for integers): no sparsity, no DLA."""

    fp32: float = Field(gt=0, le=_RATE, description="outside the tensor cores")
    tf32: float | None = Field(default=None, gt=0, le=_RATE)
    fp16: float = Field(gt=0, le=_RATE, description="tensor cores, accumulating in float32 where the two rates differ")
    bf16: float | None = Field(default=None, gt=0, le=_RATE)
    int8: float | None = Field(default=None, gt=0, le=_RATE)
    fp8: float | None = Field(default=None, gt=0, le=_RATE)
    fp4: float | None = Field(default=None, gt=0, le=_RATE)


class PowerMode(Frozen):
    """A power mode of a Jetson (`nvpmodel -q`)."""

    name: str
    watts: int | None = Field(default=None, ge=1, description="absent where the mode has no limit of its own")


class CountRange(Frozen):
    """Smallest, usual and largest batch."""

    min: int = Field(ge=1, le=_SIZE)
    opt: int = Field(ge=1, le=_SIZE)
    max: int = Field(ge=1, le=_SIZE)

    @model_validator(mode="after")
    def _ordered(self) -> CountRange:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min {self.min} <= opt {self.opt} <= max {self.max} does not hold")
        return self


class BudgetRange(Frozen):
    """Smallest, usual and largest token budget: counts, shares of the model's N ("1/9") or "all"."""

    min: Budget
    opt: Budget
    max: Budget

    @model_validator(mode="after")
    def _ordered(self) -> BudgetRange:
        # a count and a share can only be compared for one N: profiles_for brings those into order
        said = (self.min, self.opt, self.max)
        for kind in (int, str):
            sizes = [_budget_of(item, 10**9) for item in said if isinstance(item, kind)]
            if sizes != sorted(sizes):
                raise ValueError(f"min {self.min}, opt {self.opt}, max {self.max} are not in order")
        return self


class TargetProfile(Frozen):
    """One optimisation profile: the ranges that an engine is built for, and the point that it is tuned for."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    batch: CountRange
    budget: BudgetRange


class Span(NamedTuple):
    """min <= opt <= max."""

    min: int
    opt: int
    max: int


class ShapeProfile(NamedTuple):
    """A profile for one model: batch B and token budget K in numbers."""

    name: str
    batch: Span
    budget: Span


class BuildFlags(Frozen):
    """What an engine gives up for being portable, small or changeable. All off unless the target says otherwise."""

    version_compatible: bool = Field(default=False, description="loads in later TensorRT releases (8.6 and above)")
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        default="none", description="other GPUs that the engine may run on"
    )
    weight_streaming: bool = Field(default=False, description="weights may stay in host memory (TensorRT 10, 11)")
    strip_plan: bool = Field(default=False, description="an engine without weights, refitted when it is loaded")
    refit: bool = Field(default=False, description="weights can be replaced without a rebuild")


class Source(Frozen):
    """Where figures come from.

    `checked`: "read" there, "measured" on the hardware, or "unverified": there is no document, or it was not at hand.
    """

    what: str = Field(description="the fields that it is for, and how they were derived from it")
    url: str | None = Field(default=None, pattern=r"^https?://")
    document: str | None = Field(default=None, description="title, where there is no stable address")
    checked: Literal["read", "measured", "unverified"]
    date: date

    @model_validator(mode="after")
    def _named(self) -> Source:
        if self.url is None and self.document is None:
            raise ValueError("a source needs a url or a document")
        return self


class EngineTarget(Frozen):
    """One deployment target. Figures are of the module or GPU as sold, at its highest clocks."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="as in --target; the name of the file")
    title: str = Field(min_length=1, description="the vendor's name")
    kind: TargetKind
    sm: int = Field(ge=50, le=200, description="compute capability without the dot: 87 is 8.7")
    multiprocessors: int = Field(ge=1, le=10_000, description="streaming multiprocessors (SMs) of the GPU")
    memory_gb: float = Field(gt=0, le=10_000, description="GiB, as labelled; shared with the CPU where unified_memory")
    reserved_gb: float = Field(
        ge=0, description="GiB that a model cannot have: firmware, operating system, desktop; an assumption"
    )
    unified_memory: bool = Field(description="CPU and GPU share one memory")
    bandwidth_gbs: float = Field(ge=1, le=100_000, description="peak memory bandwidth, 1e9 bytes a second")
    rates: Rates
    power_modes: tuple[PowerMode, ...] = ()
    tensorrt: VersionRange
    cuda: VersionRange
    jetpack: str | None = Field(default=None, description="the JetPack that brings this TensorRT; Jetson only")
    python: str | None = Field(default=None, pattern=r"^3\.\d+$", description="Python of that JetPack's Ubuntu")
    precisions: tuple[TargetPrecision, ...] = Field(
        min_length=1, description="what engines can be built in (int4: weights only), the recommended one first"
    )
    workspace_mb: int = Field(ge=16, le=1_000_000, description="MiB that the builder may use while it tries kernels")
    optimization_level: int = Field(default=3, ge=0, le=5, description="TensorRT's builder_optimization_level")
    profiles: tuple[TargetProfile, ...] = Field(min_length=1)
    flags: BuildFlags = BuildFlags()
    sources: tuple[Source, ...] = Field(min_length=1, description="one or more for every figure")
    notes: str = Field(default="", description="what a user of this target should know")

    @model_validator(mode="after")
    def _consistent(self) -> EngineTarget:
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError("a precision is named twice")
        lacking = [name for name in self.precisions if self.rate(name) is None]
        if lacking:
            raise ValueError(f"rates lacks {', '.join(lacking)}, which precisions names")
        if self.reserved_gb >= self.memory_gb:
            raise ValueError(f"reserved_gb {self.reserved_gb} leaves nothing of memory_gb {self.memory_gb}")
        if (self.jetpack is not None) != (self.kind == "jetson"):
            raise ValueError("jetpack belongs to targets of the kind jetson, and to all of them")
        # Source: TensorRT developer guide, "Hardware Compatibility": neither DRIVE OS nor JetPack has it
        if self.kind == "jetson" and self.flags.hardware_compatibility == "ampere_plus":
            raise ValueError("hardware_compatibility ampere_plus does not exist on a Jetson")
        names = [profile.name for profile in self.profiles]
        if len(set(names)) < len(names):
            raise ValueError("two profiles have the same name")
        return self

    @property
    def compute_capability(self) -> str:
        """8.7 for sm 87, 11.0 for sm 110."""
        return f"{self.sm // 10}.{self.sm % 10}"

    @property
    def lowest_tensorrt(self) -> tuple[int, ...]:
        """What a graph for this target must be readable by."""
        return self.tensorrt.lowest

    @property
    def usable_bytes(self) -> int:
        """Memory that a model can have."""
        return int((self.memory_gb - self.reserved_gb) * 2**30)

    def rate(self, precision: TargetPrecision) -> float | None:
        """Peak dense TFLOP/s (TOPS) of `precision`; None if the GPU lacks it. int4 weights are multiplied as fp16."""
        found: float | None = getattr(self.rates, "fp16" if precision == "int4" else precision)
        return found

    def supports(self, precision: TargetPrecision) -> bool:
        return precision in self.precisions

    def profiles_for(self, tokens: int) -> tuple[ShapeProfile, ...]:
        """The profiles for a model of N = `tokens`; min <= opt <= max and 1 <= budget <= N hold in every one.

        Raises:
            ValueError: `tokens` is not positive.
        """
        if tokens < 1:
            raise ValueError(f"a model has at least one token, not {tokens}")
        made = []
        for profile in self.profiles:
            top = _budget_of(profile.budget.max, tokens)
            low = min(_budget_of(profile.budget.min, tokens), top)
            usual = min(max(_budget_of(profile.budget.opt, tokens), low), top)
            batch = Span(profile.batch.min, profile.batch.opt, profile.batch.max)
            made.append(ShapeProfile(profile.name, batch, Span(low, usual, top)))
        return tuple(made)


def _budget_of(said: int | str, tokens: int) -> int:
    """A budget in tokens, 1..N."""
    if isinstance(said, int):
        return min(said, tokens)
    return tokens if said == "all" else max(1, round(tokens / int(said.split("/")[1])))


# ---------------------------------------------------------------------------------------------------- reading


def target_names() -> tuple[str, ...]:
    """Names of the targets that ship with the package, sorted."""
    return names_in(data_folder("engines"))


def list_targets() -> tuple[EngineTarget, ...]:
    """The targets that ship with the package, sorted by name.

    Raises:
        UsageError: one of their files is damaged.
    """
    return tuple(target_from_file(data_folder("engines") / f"{name}.toml") for name in target_names())


def target_from_name(name_or_path: str) -> EngineTarget:
    """The target of a `--target` value: a name of `engines/`, or a path that ends in .toml.

    Raises:
        UnknownNameError: no such name or file.
        UsageError: the file does not parse or a value in it is wrong; the message names file, key and line.
        StorageError: the file cannot be read.
    """
    return target_from_file(path_from_name(name_or_path, data_folder("engines"), _KIND))


def target_from_file(path: Path) -> EngineTarget:
    """Read one TOML file; errors as of `target_from_name`."""
    return value_from_file(path, EngineTarget, _KIND)


def target_schema_text() -> str:
    """`engines/target.schema.json`: the JSON schema of a target file."""
    schema = EngineTarget.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**head, **schema}, indent=2, ensure_ascii=False) + "\n"
