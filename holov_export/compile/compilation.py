"""What a compilation will do, resolved before TensorRT is touched: needs neither a GPU nor TensorRT.

    export plan + target + options + a TensorRT version -> CompilePlan

TensorRT 8 gets its precision from builder flags, 10 and 11 from the graph's own types and Q/DQ nodes; every feature has
a version that brought it. Both are said here, once, for the builder and for the trtexec command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from holov_export.bundle import ENGINES, Bundle, GraphTensor, graph_tensors, labelled_file
from holov_export.compile.lowering import OPSET_OF_TENSORRT_8
from holov_export.compile.packed_profiles import largest_of, packed_profiles, within_memory
from holov_export.compile.precision_checks import check_precision
from holov_export.compile.profile import profiles_from_target
from holov_export.engine import ShapeProfile, precision_words
from holov_export.errors import BudgetError, EngineError
from holov_export.policies import Frozen
from holov_export.spec import ExportPlan, Precision, QuantizedType
from holov_export.targets import BuildFlags, EngineTarget
from holov_export.versions import version_from_text

NetworkKind = Literal["strongly-typed", "fp16-flag", "int8-flag", "fp32"]
#: kinds that let layers run in half precision, whatever the graph's types are, so that what decides has to be pinned
HALVED: tuple[NetworkKind, ...] = ("fp16-flag", "int8-flag")
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]

#: the release that brought a feature.
#: Source: NvInfer.h and samples/common/sampleOptions.cpp of github.com/NVIDIA/TensorRT at the tags 8.5.2, v8.6.1,
#: v10.0.1, v10.8.0 and v10.9.0
FIRST_RELEASE: dict[str, tuple[int, ...]] = {
    "version compatibility": (8, 6),
    "hardware compatibility": (8, 6),
    "optimisation levels": (8, 6),
    "strong typing": (10,),
    "weight streaming": (10,),
    "stripped plans": (10,),
    "compatibility with the same compute capability": (10, 9),
}


@dataclass(frozen=True)
class CompileOptions:
    """What a user asks for beyond bundle and target; None leaves it to the target.

    Attributes:
        batch, budget: "1:4:16", smallest, usual and largest; one profile is built then. Else see `profile`.
        profiles: "batch=1:1:1,budget=64:64:64" each, instead of the target's.
        max_tokens, clip_frames: the largest picture, and clip, of a packed graph; see `packed_profiles`.
        shapes: profiles as they are, with all axes, instead of all that.
        workspace_mb: MiB that the builder may use while it tries kernels.
        tf32: let float32 products round their factors to 10 bits; whatever decides which tokens stay loses by it.
        strip_plan: leave the weights out of the engine; it is refitted when it is loaded.
        timing_cache: a file instead of the one in the user's cache folder.
        use_timing_cache: read and write the timing cache.
        layer_report: ask the finished engine for its layers and write layers.json.
        prefer: where TensorRT 8 has no implementation of a layer in the float32 that it is pinned to, let it run in
            half precision instead of failing. Then compare the kept tokens.
        force: build although the readiness check found errors.
        output: folder in whose sub-folder <target> the engine goes, instead of the bundle's own `engines`.
    """

    batch: str | None = None
    budget: str | None = None
    profiles: tuple[str, ...] = ()
    max_tokens: int | None = None
    clip_frames: int | None = None
    shapes: tuple[ShapeProfile, ...] = ()
    workspace_mb: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    version_compatible: bool | None = None
    hardware_compatibility: HardwareCompatibility | None = None
    weight_streaming: bool | None = None
    strip_plan: bool | None = None
    refit: bool | None = None
    timing_cache: Path | None = None
    use_timing_cache: bool = True
    layer_report: bool = True
    prefer: bool = False
    force: bool = False
    output: Path | None = None


class CompilePlan(Frozen):
    """A resolved compilation. `--dry-run` prints it.

    Attributes:
        tensorrt: the version that it is for.
        network: how the builder learns of precisions; "fp16-flag" pins what the graph computes in float32, "int8-flag"
            (of a quantised float32 graph: INT8 and FP16) what decides which tokens stay.
        precision: of what is not quantised. quantized: of the factors of quantised products, None if there are none.
        opset: of the graph as TensorRT gets it. lowered: whether that differs from the bundle's file.
        inputs: of the graph, with the names of their axes. tokens: N of the largest picture.
        optimization_level: None where TensorRT has no such setting (8.5).
        prefer: pins are wishes; see `CompileOptions`.
    """

    target: str
    tensorrt: str
    network: NetworkKind
    precision: Precision
    quantized: QuantizedType | None = None
    opset: int
    lowered: bool
    inputs: tuple[GraphTensor, ...]
    tokens: int
    profiles: tuple[ShapeProfile, ...] = Field(min_length=1)
    workspace_mb: int
    optimization_level: int | None
    tf32: bool
    prefer: bool = False
    flags: BuildFlags

    @property
    def version(self) -> tuple[int, ...]:
        return version_from_text(self.tensorrt)

    @property
    def precision_name(self) -> str:
        """What people call it: "fp16", "int8", "fp16-int8"."""
        return precision_words(self.precision, self.quantized)


def plan_from_target(plan: ExportPlan, target: EngineTarget, options: CompileOptions, tensorrt: str) -> CompilePlan:
    """Resolve what a build with TensorRT `tensorrt` will do, and refuse what it would refuse.

    Args:
        plan: of the bundle, exported already or not.

    Raises:
        EngineError: a TensorRT outside the target's range, a precision or feature that it or the target lacks, or
            pictures with more tokens than TensorRT sorts.
        BudgetError: a profile that cannot be.
    """
    check_tensorrt(target, tensorrt)
    version = version_from_text(tensorrt)
    check_precision(plan, target, tensorrt)
    flags = _flags(target, options)
    _check_flags(flags, target, tensorrt)
    has_levels = version >= FIRST_RELEASE["optimisation levels"]
    level = target.optimization_level if options.optimization_level is None else options.optimization_level
    return CompilePlan(
        target=target.name,
        tensorrt=tensorrt,
        network=network_kind(plan, tensorrt),
        precision=plan.precision,
        quantized=None if plan.quantization is None else plan.quantization.type,
        opset=min(plan.opset, OPSET_OF_TENSORRT_8) if version < (9,) else plan.opset,
        lowered=version < (8, 6) or (version < (9,) and plan.opset > OPSET_OF_TENSORRT_8),
        inputs=graph_tensors(plan.signature[0]),
        tokens=plan.tokens,
        profiles=_profiles(plan, target, options),
        workspace_mb=options.workspace_mb or target.workspace_mb,
        optimization_level=level if has_levels else None,
        tf32=options.tf32,
        prefer=options.prefer,
        flags=flags,
    )


def _profiles(plan: ExportPlan, target: EngineTarget, options: CompileOptions) -> tuple[ShapeProfile, ...]:
    if not plan.packed and (options.max_tokens, options.clip_frames) != (None, None):
        raise BudgetError(
            f"--max-tokens and --clip-frames mean nothing here: each picture has {plan.tokens} tokens.",
            hint="Leave them out.",
        )
    if options.shapes:
        return options.shapes
    largest = largest_of(plan, options.max_tokens, options.clip_frames) if plan.packed else None
    spans = profiles_from_target(
        target,
        plan.tokens if largest is None else largest.tokens,
        batch=options.batch,
        budget=options.budget,
        profiles=options.profiles,
    )
    if largest is None:
        return spans
    if options.batch is None and not options.profiles:
        spans = within_memory(plan, spans, largest, target.usable_bytes)
    return packed_profiles(plan, spans, largest)


def network_kind(plan: ExportPlan, tensorrt: str) -> NetworkKind:
    """How TensorRT `tensorrt` is told the precision of a graph."""
    if version_from_text(tensorrt) >= (9,):
        return "strongly-typed"
    if plan.quantization is not None:
        return "int8-flag"
    return "fp32" if plan.precision is Precision.FP32 else "fp16-flag"


def check_tensorrt(target: EngineTarget, tensorrt: str) -> None:
    """Refuse a TensorRT that the target does not run.

    Raises:
        EngineError: it is outside the target's range.
    """
    if not target.tensorrt.holds(tensorrt):
        raise EngineError(
            f"the target '{target.name}' runs TensorRT {target.tensorrt}, not {tensorrt}.",
            hint="`holov-export targets` lists targets with their TensorRT; choose another --target.",
        )


def branches_of(target: EngineTarget) -> tuple[str, ...]:
    """The lowest TensorRT of each kind of network in the target's range: ("8.6", "10.0", "11.0") for 8.6 to 11.4."""
    low, high = target.tensorrt.lowest, target.tensorrt.highest
    starts = [target.tensorrt.min]
    starts += [f"{major}.0" for major in (10, 11) if low < (major,) and (major,) <= high]
    return tuple(starts)


def engine_folder(bundle: Path, label: str, options: CompileOptions) -> Path:
    """Where the engine of a bundle goes."""
    return (options.output or bundle / ENGINES) / label


def engine_label(target: str, bundle: Bundle) -> str:
    """Name of an engine's folder: the target, and the graph unless it is the bundle's default one."""
    return labelled_file(bundle.label, target)


def _flags(target: EngineTarget, options: CompileOptions) -> BuildFlags:
    """The target's flags with the user's over them."""
    asked = {name: getattr(options, name) for name in BuildFlags.model_fields if getattr(options, name) is not None}
    return target.flags.model_copy(update=asked)


def _check_flags(flags: BuildFlags, target: EngineTarget, tensorrt: str) -> None:
    same = flags.hardware_compatibility == "same_compute_capability"
    wanted = {
        "version compatibility": flags.version_compatible,
        "hardware compatibility": flags.hardware_compatibility != "none",
        "compatibility with the same compute capability": same,
        "weight streaming": flags.weight_streaming,
        "stripped plans": flags.strip_plan,
    }
    for feature, asked in wanted.items():
        first = FIRST_RELEASE[feature]
        if asked and version_from_text(tensorrt) < first:
            raise EngineError(
                f"TensorRT {tensorrt} has no {feature}; it came with {'.'.join(map(str, first))}.",
                hint="Leave the option out, or build with a newer TensorRT.",
            )
    # Source: TensorRT developer guide 8.6, "Hardware Compatibility"
    if flags.hardware_compatibility == "ampere_plus" and target.kind == "jetson":
        raise EngineError(
            "TensorRT of JetPack builds no engines for other GPUs.", hint="Compile on each board that will run it."
        )
    if flags.hardware_compatibility == "ampere_plus" and target.sm < 80:
        raise EngineError(f"ampere_plus needs sm_80 or newer, '{target.name}' is sm_{target.sm}.")
