"""Which precisions a target and its TensorRT can have: those of a graph's floats, and of its quantised products."""

from __future__ import annotations

from holov_export.compile.lowering import OPSET_OF_TENSORRT_8
from holov_export.errors import EngineError
from holov_export.spec import ExportPlan, Precision, Quantization, QuantizedType
from holov_export.targets import EngineTarget
from holov_export.versions import version_from_text

#: the first compute capabilities with bfloat16 (Ampere) and with 8-bit floats (Ada).
#: Source: TensorRT support matrix, "Hardware and Precision"
_SM_OF_BF16, _SM_OF_FP8 = 80, 89
#: the first releases that engines of these types are built with; 9 has them too, and no target runs it.
#: Source: onnx/onnx-tensorrt docs/Changelog.md, 9.0; NvInferRuntimeBase.h 8.6, "kFP8 is not supported yet"
_FIRST_WITH_BF16, _FIRST_WITH_FP8 = (10,), (10,)
_STRONGLY_TYPED = (9,)


def check_precision(plan: ExportPlan, target: EngineTarget, tensorrt: str) -> None:
    """Refuse a precision that a target or its TensorRT cannot have.

    Args:
        plan: of the bundle. tensorrt: the version that will build.

    Raises:
        EngineError: says why, and which export fits.
    """
    if plan.quantization is not None:
        _check_quantization(plan.quantization, plan, target, tensorrt)
    precision = plan.precision
    if not target.supports(precision.value):
        raise EngineError(
            f"the target '{target.name}' builds {', '.join(target.precisions)}; the bundle is {plan.precision_name}.",
            hint=f"Export it again with --{_exportable(target)}.",
        )
    if precision is not Precision.BF16:
        return
    if version_from_text(tensorrt) < _FIRST_WITH_BF16:
        raise EngineError(
            f"the bundle is {plan.precision_name}, which TensorRT {tensorrt} cannot build from a graph's types.",
            hint="Export it again with --fp16, or use TensorRT 10 or newer.",
        )
    if target.sm < _SM_OF_BF16:
        raise EngineError(f"sm_{target.sm} has no bfloat16.", hint="Export it again with --fp16.")


def _check_quantization(quantization: Quantization, plan: ExportPlan, target: EngineTarget, tensorrt: str) -> None:
    name, kind = plan.precision_name, quantization.type
    if quantization.engine == "cpu":
        raise EngineError(
            f"the bundle is {name}: TensorRT does not read that form, which ONNX Runtime's CPU provider is fast in.",
            hint=f"Export it again with --{kind.value}, without the CPU's form.",
        )
    if kind is QuantizedType.FP8 and target.sm < _SM_OF_FP8:
        raise EngineError(
            f"the bundle is {name}, and {target.title} (sm_{target.sm}) has no 8-bit floats: they came with sm_89.",
            hint="Export it again with --int8." if target.supports("int8") else "Export it again with --fp16.",
        )
    if not target.supports(kind.value):
        raise EngineError(
            f"the target '{target.name}' builds {', '.join(target.precisions)}; the bundle is {name}.",
            hint=f"Export it again with --{_exportable(target)}.",
        )
    version = version_from_text(tensorrt)
    if kind is QuantizedType.FP8 and version < _FIRST_WITH_FP8:
        raise EngineError(
            f"the bundle is {name}, and TensorRT {tensorrt} has no 8-bit floats.",
            hint="Export it again with --int8, or use TensorRT 10 or newer.",
        )
    if plan.precision is not Precision.FP32 and version < _STRONGLY_TYPED:
        raise EngineError(
            f"the bundle is {name}: {plan.precision.dtype} scales came with opset 19, TensorRT {tensorrt} reads opset "
            f"{OPSET_OF_TENSORRT_8}.",
            hint=f"Export it again with --{kind.value} alone: TensorRT 8 halves the rest by its FP16 flag.",
        )


def _exportable(target: EngineTarget) -> str:
    known = {item.value for item in Precision}
    return next((name for name in target.precisions if name in known), "fp32")
