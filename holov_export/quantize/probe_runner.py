"""Runs a graph with switches: `with ProbeRunner(probe, plan) as runner: runner.run(pixels, quota, quantized=names)`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import EnvironmentFaultError
from holov_export.extras import require
from holov_export.quantize.probe_graph import MULTIPLICATIONS, SWITCHES, ProbeGraph
from holov_export.runtime.packing import PackedInputs, packed_inputs, pictures_from_rows
from holov_export.signature import BUDGET, OUTPUTS, PIXEL_VALUES, QUOTA
from holov_export.spec import ExportPlan
from holov_export.tensors import PixelBatch, VisualTokens

if TYPE_CHECKING:
    from typing_extensions import Self

Feed = dict[str, npt.NDArray[np.generic]]
#: makes integer products of rounded factors, which overflow on some processors, and fails for 8-bit floats. Source:
#: onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc
_FUSIONS = ["QDQSelectorActionTransformer"]
#: of ONNX Runtime's log
_ERRORS_ONLY = 3
#: where a model that is no file finds its weights. Source: onnxruntime_session_options_config_keys.h
_WEIGHT_FOLDER = "session.model_external_initializers_file_folder_path"


class ProbeRunner:
    """One ONNX Runtime session on the CPU."""

    def __init__(self, probe: ProbeGraph, plan: ExportPlan, *, threads: int | None = None) -> None:
        """Load the graph.

        Args:
            plan: of the graph that the probe was made from.
            threads: CPU threads within one operator; None for one per core.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            EnvironmentFaultError: this ONNX Runtime cannot load the graph.
        """
        ort = require("onnxruntime")
        self._plan = plan
        self._probe = probe
        self._dtype = next(np.dtype(item.dtype) for item in plan.signature[0] if item.name == PIXEL_VALUES)
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry(_WEIGHT_FOLDER, str(probe.folder.resolve()))
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            content = probe.model.SerializeToString()
            self._session = ort.InferenceSession(
                content, options, providers=["CPUExecutionProvider"], disabled_optimizers=_FUSIONS
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EnvironmentFaultError(
                f"ONNX Runtime {ort.__version__} cannot load the graph with switches: {error}"
            ) from error

    def run(self, pixels: PixelBatch, quota: Sequence[int], *, quantized: Collection[str] = ()) -> VisualTokens:
        """The visual tokens and the saliency of a batch, with some groups quantised.

        Args:
            pixels: B images, or clips. quota: tokens wanted of each; the largest is the budget.
            quantized: names of groups.
        """
        feed, packed = self._feed(pixels, quota, quantized)
        tokens, positions, counts, saliency = self._fetched(OUTPUTS, feed)
        seen = VisualTokens(tokens, positions, counts, saliency)
        return seen if packed is None else pictures_from_rows(seen, packed, pixels.layouts)

    def multiplications(self, pixels: PixelBatch, quota: Sequence[int]) -> tuple[int, ...]:
        """How many each of the graph's linears (`ProbeGraph.linears`) costs for a batch."""
        feed, _ = self._feed(pixels, quota, ())
        left = self._fetched((MULTIPLICATIONS,), feed)[0].tolist()
        return tuple(sum(left.pop(0) for _ in linear.nodes) for linear in self._probe.linears)

    def _feed(
        self, pixels: PixelBatch, quota: Sequence[int], quantized: Collection[str]
    ) -> tuple[Feed, PackedInputs | None]:
        on = np.array([group.name in quantized for group in self._probe.groups])
        feed: Feed = {PIXEL_VALUES: np.ascontiguousarray(pixels.pixel_values, dtype=self._dtype), SWITCHES: on}
        wanted = np.array(quota, dtype=np.int64)
        if not self._plan.packed:
            return {**feed, BUDGET: wanted.max(keepdims=True), QUOTA: wanted}, None
        packed = packed_inputs(pixels.layouts, self._plan, wanted)
        feed.update({array.name: array.values for array in packed.arrays})
        return {**feed, BUDGET: np.array([packed.budget], dtype=np.int64), QUOTA: packed.quota}, packed

    def _fetched(self, names: Sequence[str], feed: Feed) -> list[Any]:
        if self._session is None:
            raise EnvironmentFaultError("the runner is closed.")
        try:
            return self._session.run(list(names), feed)  # type: ignore[no-any-return]
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EnvironmentFaultError(f"ONNX Runtime failed in the graph with switches: {error}") from error

    def close(self) -> None:
        """Release the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
