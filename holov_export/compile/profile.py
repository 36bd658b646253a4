"""Optimisation profiles: the batches and token budgets that one engine runs without a rebuild.

The dynamic axes of the inputs have names, so their shapes are given; `budget` is a shape value, so its values are.
Packed graphs have further axes; see `packed_profiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from holov_export.bundle import GraphTensor
from holov_export.engine import AxisSizes, ShapeProfile
from holov_export.errors import BudgetError, EngineError
from holov_export.signature import BUDGET
from holov_export.targets import EngineTarget, TargetProfile

_HINT = "Write smallest:usual:largest, for example --batch 1:4:16 --budget 1:64:576"


def profiles_from_target(
    target: EngineTarget,
    tokens: int,
    *,
    batch: str | None = None,
    budget: str | None = None,
    profiles: Sequence[str] = (),
) -> tuple[ShapeProfile, ...]:
    """The profiles of an engine for a model of N = `tokens`, clamped to 1..N.

    Args:
        target: gives what the user did not say.
        batch, budget: "1:4:16" (or "4" for 4:4:4; a budget also "1/9" and "all"): one profile. What is missing comes
            from the target's profile with the largest batch.
        profiles: "batch=1:1:1,budget=64:64:64" each.

    Raises:
        BudgetError: not three numbers in order, or both forms at once.
    """
    if profiles and (batch or budget):
        raise BudgetError("--profile and --batch or --budget exclude each other.", hint="Say everything in --profile.")
    if profiles:
        said = tuple(_profile_from_text(text, f"profile-{index}") for index, text in enumerate(profiles))
    elif batch or budget:
        said = (_widest_with(target, batch, budget),)
    else:
        said = target.profiles
    made = target.model_copy(update={"profiles": said}).profiles_for(tokens)
    spans = (ShapeProfile(batch=item.batch, budget=item.budget) for item in made)
    return tuple(dict.fromkeys(spans))  # clamping can make two alike, and TensorRT would tune both


def _widest_with(target: EngineTarget, batch: str | None, budget: str | None) -> TargetProfile:
    widest = max(target.profiles, key=lambda item: item.batch.max)
    made = {
        "name": "asked",
        "batch": _span_from_text(batch, "batch") if batch else widest.batch.model_dump(),
        "budget": _span_from_text(budget, "budget") if budget else widest.budget.model_dump(),
    }
    return _validated(made, " and ".join(text for text in (batch, budget) if text))


def _profile_from_text(text: str, name: str) -> TargetProfile:
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if sorted(parts) != ["batch", "budget"]:
        raise BudgetError(
            f"'{text}' is no profile: it has to say batch and budget.",
            hint="For example: --profile batch=1:1:1,budget=64:64:64",
        )
    return _validated({"name": name, **{key: _span_from_text(value, key) for key, value in parts.items()}}, text)


def _span_from_text(text: str, what: str) -> dict[str, int | str]:
    """{"min": 1, "opt": 4, "max": 16} from "1:4:16"; a single number is all three."""
    parts = [part.strip() for part in text.split(":")]
    parts = parts * 3 if len(parts) == 1 else parts
    if len(parts) != 3 or not all(parts):
        raise BudgetError(f"the {what} '{text}' is not three numbers.", hint=_HINT)
    values = [int(part) if part.isdecimal() else part for part in parts]
    return dict(zip(("min", "opt", "max"), values, strict=True))


def _validated(values: dict[str, Any], text: str) -> TargetProfile:
    try:
        return TargetProfile.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()
        )
        raise BudgetError(f"'{text}' is no profile: {problems}.", hint=_HINT) from error


def add_profiles(
    builder: Any, network: Any, config: Any, profiles: Sequence[ShapeProfile], inputs: Sequence[GraphTensor]
) -> None:
    """Give the profiles to a TensorRT builder configuration, in order.

    Args:
        inputs: of the graph, with the names of their axes.

    Raises:
        EngineError: the network has an input, a dynamic axis or a shape value that is none of the signature's, or
            TensorRT refuses.
    """
    shapes = {item.name: item.shape for item in inputs}
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for number, shape in enumerate(profiles):
        profile = builder.create_optimization_profile()
        try:
            for tensor in tensors:
                _set_input(profile, tensor, shapes.get(tensor.name, ()), shape)
            taken = config.add_optimization_profile(profile) >= 0
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"TensorRT refuses profile {number} ({words(shape)}): {error}") from error
        if not taken:
            raise EngineError(f"TensorRT refuses profile {number} ({words(shape)}).")


def _set_input(profile: Any, tensor: Any, axes: Sequence[int | str], shape: ShapeProfile) -> None:
    if tensor.is_shape_tensor:
        if tensor.name != BUDGET:
            raise EngineError(f"the input '{tensor.name}' decides shapes, and only '{BUDGET}' may.")
        profile.set_shape_input(tensor.name, *([value] for value in shape.budget))
        return
    dims = [int(size) for size in tensor.shape]
    named = len(axes) == len(dims) and all(
        isinstance(axis, str) if size < 0 else axis == size for axis, size in zip(axes, dims, strict=True)
    )
    if not named:
        raise EngineError(
            f"the input '{tensor.name}' is {dims}, the signature of the graph says {list(axes)}.",
            hint="Export the bundle again with this version.",
        )
    if any(size < 0 for size in dims):
        profile.set_shape(tensor.name, *(sized(axes, sizes) for sizes in shape.corners))


def sized(axes: Sequence[int | str], sizes: AxisSizes) -> tuple[int, ...]:
    """The shape of an input in numbers."""
    return tuple(axis if isinstance(axis, int) else sizes.of(axis) for axis in axes)


def words(shape: ShapeProfile) -> str:
    """batch 1:4:16, budget 1:64:576; of packed graphs with the further axes."""
    spans = [("batch", shape.batch), ("budget", shape.budget), *((axis.name, axis.span) for axis in shape.axes)]
    return ", ".join(f"{name} {':'.join(map(str, span))}" for name, span in spans)
