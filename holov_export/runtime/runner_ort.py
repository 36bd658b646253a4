"""ONNX Runtime over a bundle's vision graph: on the CPU, through CUDA, or through its TensorRT provider.

The CUDA and TensorRT providers have not run on a real GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from holov_export.bundle import Bundle
from holov_export.errors import BundleError, EnvironmentFaultError, ImageError
from holov_export.extras import require
from holov_export.runtime.ort_providers import CUDA, OPENVINO, TENSORRT, TENSORRT_BATCHES, session_from_bundle
from holov_export.runtime.packing import NamedArray, PackedInputs, Spread, packed_inputs, pictures_from_rows
from holov_export.runtime.runner import checked_budget, joined, quota_array
from holov_export.signature import BUDGET, COUNTS, OUTPUTS, PIXEL_VALUES, POSITIONS, QUOTA, SALIENCY
from holov_export.signature import VISUAL_TOKENS as TOKENS
from holov_export.spec import ExportPlan
from holov_export.tensors import Int64Array, PixelBatch, VisualTokens

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class GraphFeed:
    """Every input of a vision graph, for one run.

    Attributes:
        packed: what the rows of the batch are, for packed graphs.
    """

    arrays: tuple[NamedArray, ...]
    packed: PackedInputs | None = None


def feed_from_pixels(
    pixels: PixelBatch,
    plan: ExportPlan,
    dtype: np.dtype[Any],
    budget: int,
    quotas: Int64Array,
    spread: Spread = "frames",
) -> GraphFeed:
    """What the graph of `plan` is fed for some pictures.

    Args:
        dtype: of the graph's pixels.
        budget: of graphs that are not packed; those take the largest quota of their rows.
        quotas: int64 [B]
    """
    values = NamedArray(PIXEL_VALUES, np.ascontiguousarray(pixels.pixel_values, dtype=dtype))
    if not plan.packed:
        return GraphFeed((values, NamedArray(BUDGET, np.array([budget], dtype=np.int64)), NamedArray(QUOTA, quotas)))
    packed = packed_inputs(pixels.layouts, plan, quotas, spread)
    size = NamedArray(BUDGET, np.array([packed.budget], dtype=np.int64))
    return GraphFeed((values, *packed.arrays, size, NamedArray(QUOTA, packed.quota)), packed)


class OrtRunner:
    """One ONNX Runtime session, reused for every call. It may be called from several threads."""

    def __init__(
        self, bundle: Bundle, *, provider: str = "auto", threads: int | None = None, saliency: bool = False
    ) -> None:
        """Load the vision graph.

        Args:
            bundle: an opened bundle.
            provider: "cpu", "cuda", "tensorrt", or "auto" for CUDA where this ONNX Runtime has it.
            threads: CPU threads within one operator; None for one per core.
            saliency: what `run` does when it is not told.

        Raises:
            UnknownNameError: another provider.
            MissingExtraError: onnxruntime is not installed.
            EnvironmentFaultError: CUDA or TensorRT was asked for and is not there or fell back to the CPU, or this ONNX
                Runtime cannot load the graph.
            BundleError: the graph's inputs or outputs are not those of the signature.
        """
        _check_type(bundle)
        self._saliency = saliency
        self._plan = bundle.manifest.plan
        self._session = session_from_bundle(bundle, provider, threads)
        _check_names(self._session, bundle)
        pixels = next(item for item in bundle.manifest.inputs if item.name == PIXEL_VALUES)
        self._dtype = np.dtype(pixels.dtype)
        self._row_shape = tuple(int(size) for size in pixels.shape[1:])
        self.tokens = self._plan.tokens
        self._largest = TENSORRT_BATCHES[-1] if provider == "tensorrt" else None
        device = {CUDA: "cuda", TENSORRT: "tensorrt", OPENVINO: "openvino"}.get(self._session.get_providers()[0], "cpu")
        self.name = f"onnxruntime {require('onnxruntime').__version__} ({device})"

    def run(
        self,
        pixels: PixelBatch,
        budget: int,
        quota: Sequence[int] | None = None,
        *,
        saliency: bool | None = None,
        spread: Spread = "frames",
    ) -> VisualTokens:
        """See `Runner.run`."""
        budget = checked_budget(budget, self.tokens)
        if pixels.pixel_values.shape[1:] != self._row_shape or bool(pixels.layouts) != self._plan.packed:
            raise ImageError(f"the pixels are {pixels.pixel_values.shape[1:]}, the graph takes {self._row_shape}.")
        quotas = quota_array(quota, budget, len(pixels))
        fetch = self._saliency if saliency is None else saliency
        step = self._largest or max(1, len(pixels))
        return joined(
            [
                self._run_part(pixels.part(at, at + step), budget, quotas[at : at + step], fetch, spread)
                for at in range(0, max(1, len(pixels)), step)
            ]
        )

    def _run_part(
        self, pixels: PixelBatch, budget: int, quotas: Int64Array, saliency: bool, spread: Spread
    ) -> VisualTokens:
        feed = feed_from_pixels(pixels, self._plan, self._dtype, budget, quotas, spread)
        seen = self._fetched(feed, saliency)
        return seen if feed.packed is None else pictures_from_rows(seen, feed.packed, pixels.layouts)

    def _fetched(self, feed: GraphFeed, saliency: bool) -> VisualTokens:
        wanted = [TOKENS, POSITIONS, COUNTS, *([SALIENCY] if saliency else [])]
        if self._session is None:
            raise EnvironmentFaultError("the runner is closed.")
        values = {item.name: item.values for item in feed.arrays}
        try:
            tokens, positions, counts, *rest = self._session.run(wanted, values)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EnvironmentFaultError(f"ONNX Runtime failed in the vision graph: {error}") from error
        return VisualTokens(tokens, positions, counts, rest[0] if rest else None)

    def close(self) -> None:
        """Release the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check_type(bundle: Bundle) -> None:
    dtype = next((item.dtype for item in bundle.manifest.inputs if item.name == PIXEL_VALUES), None)
    if dtype is None:
        raise BundleError(f"the manifest describes no input '{PIXEL_VALUES}'.", hint="Export the bundle again.")
    if dtype == "bfloat16":
        raise EnvironmentFaultError(
            "ONNX Runtime cannot run a bfloat16 vision graph: it has no such Conv on the CPU.",
            hint="Compile the bundle for TensorRT, or export with --fp16.",
        )


def _check_names(session: Any, bundle: Bundle) -> None:
    has = [item.name for item in session.get_inputs()], [item.name for item in session.get_outputs()]
    inputs = [item.name for item in bundle.manifest.inputs]
    if set(has[0]) != set(inputs) or not set(OUTPUTS) <= set(has[1]):
        raise BundleError(
            f"the vision graph has inputs {has[0]} and outputs {has[1]}, expected {inputs} and {list(OUTPUTS)}.",
            hint="Export the bundle again with this version.",
        )
