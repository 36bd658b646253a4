"""Batches of unequal pictures and clips, cut into parts that an engine's profiles hold."""

from __future__ import annotations

from dataclasses import dataclass

from holov_export.engine import AxisSize, AxisSizes
from holov_export.errors import EngineError, ImageError
from holov_export.runtime.engine_context import LoadedEngine, profile_for, profiles_text, sizes_text
from holov_export.runtime.lane import Feed, Shape
from holov_export.runtime.packing import PackedInputs, Spread, packed_inputs
from holov_export.signature import BUDGET, PIXEL_VALUES, QUOTA
from holov_export.spec import ExportPlan
from holov_export.tensors import ImageLayout, Int64Array, PixelBatch


@dataclass(frozen=True)
class PackedPart:
    """Pictures that go through the engine at once, and as what."""

    pixels: PixelBatch
    inputs: PackedInputs
    shape: Shape

    @property
    def feed(self) -> Feed:
        return Feed(self.pixels.pixel_values, self.inputs.quota, self.inputs.arrays)


def packed_parts(
    pixels: PixelBatch, quotas: Int64Array, plan: ExportPlan, spread: Spread, engine: LoadedEngine
) -> list[PackedPart]:
    """The whole batch if a profile holds it, else halves of it, and so on.

    Args:
        quotas: int64 [B], of the pictures. plan: of the graph. spread: of clips.

    Raises:
        EngineError: no profile holds one of the pictures by itself.
        ImageError: there is none.
    """
    if len(pixels) == 0:
        raise ImageError("there is no image.")
    waiting, parts = [range(len(pixels))], list[PackedPart]()
    while waiting:
        images = waiting.pop()
        few = pixels.part(images.start, images.stop)
        inputs = packed_inputs(few.layouts, plan, quotas[images.start : images.stop], spread)
        sizes = axis_sizes(few, inputs, engine)
        profile = profile_for(engine.profiles, sizes)
        if profile is not None:
            parts.append(PackedPart(few, inputs, Shape(profile, sizes)))
        elif len(images) == 1:
            raise _refusal(few.layouts[0], images.start, sizes, engine)
        else:
            half = len(images) // 2
            waiting += [images[half:], images[:half]]  # the last one is taken first
    return parts


def axis_sizes(pixels: PixelBatch, inputs: PackedInputs, engine: LoadedEngine) -> AxisSizes:
    """How long each axis is for these inputs."""
    shapes = {PIXEL_VALUES: pixels.pixel_values.shape, **{array.name: array.values.shape for array in inputs.arrays}}
    found: dict[str, int] = {}
    for name in engine.inputs:
        if name in (BUDGET, QUOTA):
            continue
        for axis, size in zip(engine.tensors[name].axes, shapes[name], strict=True):
            if isinstance(axis, str) and axis != "batch":
                found.setdefault(axis, int(size))
    further = tuple(AxisSize(axis, size) for axis, size in found.items())
    return AxisSizes(len(inputs.rows), inputs.budget, further)


def _refusal(layout: ImageLayout, index: int, sizes: AxisSizes, engine: LoadedEngine) -> EngineError:
    """Why a picture or clip cannot be run, and with what it could."""
    what = "clip" if layout.kind == "video" else "image"
    most = max(profile.corners[2].of("tokens") for profile in engine.profiles)
    if layout.tokens > most:
        return EngineError(
            f"{what} {index + 1} has {layout.tokens} tokens, the engine '{engine.label}' takes at most {most}.",
            hint=f"Compile it with --max-tokens {layout.tokens}, or make the {what} smaller.",
        )
    hint = "Compile it with --batch, --budget and --max-tokens that hold it."
    if layout.kind == "video" and len(layout.regions) > max(item.corners[2].of("views") for item in engine.profiles):
        hint = "Compile it with --clip-frames, the frames of the longest clip."
    return EngineError(
        f"the engine '{engine.label}' has no profile for {what} {index + 1}, {sizes_text(sizes)}: "
        f"{profiles_text(engine.profiles)}.",
        hint=hint,
    )
