"""Which quantised bundles the TensorRT and the GPU of this machine can have."""

from __future__ import annotations

from steps import Steps

from holov_export.bundle import Bundle
from holov_export.compile.compilation import CompileOptions, plan_from_target
from holov_export.compile.machine import this_machine
from holov_export.errors import EngineError, HolovExportError
from holov_export.targets import EngineTarget


def fitting(steps: Steps, bundles: list[Bundle], target: EngineTarget) -> list[Bundle]:
    """The bundles without the quantised ones that TensorRT cannot have here, which are noted with the reason."""
    quantized = [bundle for bundle in bundles if bundle.manifest.plan.quantization is not None]
    try:
        tensorrt = this_machine().tensorrt if quantized else ""
    except HolovExportError:
        return bundles  # the builds will say it
    refused = []
    for bundle in quantized:
        try:
            plan_from_target(bundle.manifest.plan, target, CompileOptions(), tensorrt)
        except EngineError as error:
            refused.append({"bundle": bundle.folder.name, **named(bundle), "reason": error.message})
    steps.found["refused"] = refused
    return [bundle for bundle in bundles if bundle.folder.name not in {entry["bundle"] for entry in refused}]


def named(bundle: Bundle) -> dict[str, str]:
    """What a row says of a bundle's precision: "fp16", "int8", "fp16-fp8"."""
    return {"precision_name": bundle.manifest.plan.precision_name}
