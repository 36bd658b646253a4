"""ONNX Runtime's execution providers for a vision graph, and no silent way back to its own kernels for the CPU.

"openvino" computes on the CPU as well, with OpenVINO's kernels; it comes in a wheel of its own, onnxruntime-openvino.

ONNX Runtime falls back in three places: when a provider's library does not load, when a provider takes only a part of
the graph, and when a run fails. Each is an error here, unless the provider was left to us ("auto").
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from holov_export.bundle import Bundle
from holov_export.errors import EnvironmentFaultError, StorageError, UnknownNameError, UsageError
from holov_export.extras import require
from holov_export.runtime.openvino_graph import graph_for_openvino, openvino_options
from holov_export.signature import BUDGET, PIXEL_VALUES, QUOTA

PROVIDERS = ("auto", "cpu", "openvino", "cuda", "tensorrt")
#: of the vision graph alone: decoders have none
VISION_ONLY = frozenset({"openvino", "tensorrt"})
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
_ERRORS_ONLY = 3

#: smallest, usual and largest batch of the TensorRT provider's profile; a larger batch is run in parts
TENSORRT_BATCHES = (1, 1, 16)
#: where the work of the graph is. Shape arithmetic belongs on the CPU: the providers leave it there on purpose
_HEAVY = frozenset(
    {"Attention", "Conv", "FusedConv", "FusedMatMul", "Gemm", "LayerNormalization", "MatMul", "MultiHeadAttention"}
    | {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
)


def decoder_provider(provider: str) -> str:
    """Where a decoder runs whose vision graph runs with `provider`."""
    return "auto" if provider in VISION_ONLY else provider


def session_from_bundle(bundle: Bundle, provider: str, threads: int | None) -> Any:
    """An InferenceSession over vision.onnx.

    Args:
        provider: one of `PROVIDERS`.
        threads: CPU threads within one operator; None for one per core.

    Raises:
        UnknownNameError: another provider.
        MissingExtraError: onnxruntime is not installed.
        EnvironmentFaultError: the provider is not there or fell back to the CPU, or the graph does not load.
        StorageError: the folder for the TensorRT provider's engines cannot be made.
    """
    if provider not in PROVIDERS:
        raise UnknownNameError(f"unknown provider '{provider}'.", hint=f"Known: {', '.join(PROVIDERS)}.")
    ort = require("onnxruntime")
    wanted = _WANTED.get(provider)
    _refuse_absent(ort, wanted)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    quantization = bundle.manifest.plan.quantization
    if quantization is not None and quantization.engine == "tensorrt":
        # what the Q/DQ nodes say, as TensorRT reads them; ORT's fusions round otherwise, and do not load 8-bit floats
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if wanted is None:
        first = CUDA if provider == "auto" and CUDA in ort.get_available_providers() else CPU
        if not exact_bytes():
            options.add_session_config_entry("session.x64quantprecision", "1")
        return _loaded(ort, bundle, options, [first, CPU] if first == CUDA else [CPU], forgiving=first == CUDA)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen: list[Any] = [CUDA, CPU]
    if wanted == TENSORRT:
        chosen = [(TENSORRT, tensorrt_options(bundle, _cache_folder(bundle))), CUDA, CPU]
    elif wanted == OPENVINO:
        chosen = [(OPENVINO, openvino_options(threads)), CPU]
    session = _loaded(ort, bundle, options, chosen, forgiving=False)
    _refuse_fallback(session, wanted)
    return session


_NAMES = {CUDA: "CUDA", TENSORRT: "TensorRT", OPENVINO: "OpenVINO"}
_WANTED = {"cuda": CUDA, "tensorrt": TENSORRT, "openvino": OPENVINO}


def _refuse_absent(ort: Any, wanted: str | None) -> None:
    """Refuse a provider that this ONNX Runtime was built without.

    Raises:
        EnvironmentFaultError: with the pip line of the wheel that has it.
    """
    available = ort.get_available_providers()
    if wanted is None or wanted in available:
        return
    # the wheels share one import directory, so a second one overwrites the first
    other = "onnxruntime-openvino" if wanted == OPENVINO else '"holov-export[gpu]"'
    raise EnvironmentFaultError(
        f"this ONNX Runtime ({ort.__version__}) has no {_NAMES[wanted]}; it has {', '.join(available)}.",
        hint=f"Run: pip uninstall onnxruntime onnxruntime-genai; pip install {other}. Or choose --provider cpu.",
    )


def _loaded(ort: Any, bundle: Bundle, options: Any, providers: list[Any], *, forgiving: bool) -> Any:
    """A session that does not change its provider later. With `forgiving` the CPU takes over if the first fails now.

    ONNX Runtime's own fallback prints to stdout, so it is off, and done here.
    """
    graph: str | bytes = str(bundle.vision)
    if OPENVINO in [item if isinstance(item, str) else item[0] for item in providers]:
        graph = graph_for_openvino(bundle.vision)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    try:
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base
        if forgiving:
            return _loaded(ort, bundle, options, [CPU], forgiving=False)
        raise EnvironmentFaultError(f"ONNX Runtime {ort.__version__} cannot load vision.onnx: {error}") from error
    session.disable_fallback()  # a run that fails would else be done again on the CPU, and all later ones
    return session


def exact_bytes(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies uint8 by int8 exactly.

    x86 processors without VNNI add pairs of such products in 16 bits, which saturate: a product of 256 terms was wrong
    by 9 % of its largest value. ONNX Runtime then takes a slower way if it is told to.

    Source: onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        return "vnni" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # slower, but right


def _refuse_fallback(session: Any, wanted: str) -> None:
    """Refuse a session that does not use the provider that was asked for, or leaves heavy work to the CPU.

    Raises:
        EnvironmentFaultError: names what runs on the CPU.
    """
    name = _NAMES[wanted]
    if session.get_providers()[0] != wanted:
        # it warns and goes on with the CPU when a CUDA or cuDNN library cannot be loaded
        taken = "the CPU" if session.get_providers()[0] == CPU else "CUDA"
        compare = "Install onnxruntime-openvino again"
        if wanted != OPENVINO:
            compare = f"Compare the {name}, CUDA and cuDNN versions with onnxruntime-gpu's"
        raise EnvironmentFaultError(
            f"ONNX Runtime fell back to {taken}: it could not load its {name} libraries.",
            hint=f"{compare}, or choose --provider cpu.",
        )
    assignment = getattr(session, "get_provider_graph_assignment_info", None)  # from ONNX Runtime 1.24 on
    if assignment is None:
        return
    groups = [(group.ep_name, [node.op_type for node in group.get_nodes()]) for group in assignment()]
    heavy = sorted({op for provider, ops in groups if provider == CPU for op in ops if op in _HEAVY})
    if heavy:
        raise EnvironmentFaultError(
            f"ONNX Runtime leaves {', '.join(heavy)} to the CPU: its {name} provider does not take them.",
            hint="Choose --provider cpu."
            if wanted == OPENVINO
            else "Choose --provider cpu, or compile the bundle for TensorRT and ask with --engine tensorrt.",
        )
    if groups and all(provider != wanted for provider, _ in groups):
        raise EnvironmentFaultError(
            f"ONNX Runtime gives no part of the graph to its {name} provider.",
            hint=f"Choose --provider {'cpu' if wanted == OPENVINO else 'cuda'}.",
        )


def tensorrt_options(bundle: Bundle, cache: Path) -> dict[str, str]:
    """Options of the TensorRT provider: one profile for all budgets, engines and timings kept in `cache`.

    The provider's own FP16 switch stays off: from TensorRT 10 on the network is then typed as the graph is, which keeps
    in float32 what the graph computes in float32. With TensorRT 8 an fp16 graph runs in float32 that way.

    Source: onnxruntime.ai, "TensorRT Execution Provider", explicit shape range; for the shape input `budget` the three
    values are those of the input itself (tensorrt_execution_provider.cc, ApplyProfileShapesFromProviderOptions).

    Raises:
        UsageError: the graph is packed.
    """
    plan = bundle.manifest.plan
    if plan.packed:
        raise UsageError(
            f"ONNX Runtime's TensorRT provider is not used for '{plan.model.name}': its pictures have unequal numbers "
            "of tokens, and nothing says here how large they become.",
            hint="Choose --provider cpu or cuda, or compile the bundle and ask with --engine tensorrt.",
        )
    budgets = (1, max(1, round(plan.tokens / 9)), plan.tokens)

    def shapes(at: int) -> str:
        batch, side = TENSORRT_BATCHES[at], plan.model.clip.image_size
        return f"{PIXEL_VALUES}:{batch}x3x{side}x{side},{BUDGET}:{budgets[at]},{QUOTA}:{batch}"

    return {
        "trt_profile_min_shapes": shapes(0),
        "trt_profile_opt_shapes": shapes(1),
        "trt_profile_max_shapes": shapes(2),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }


def _cache_folder(bundle: Bundle) -> Path:
    """$XDG_CACHE_HOME/holov-export/onnxruntime/<hash of the graph>: an engine must not outlive its graph."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hashes = {item.path: item.sha256 for item in bundle.manifest.artifacts}
    both = "".join(hashes.get(name, "") for name in (bundle.graph, bundle.weights))
    key = hashlib.sha256(both.encode()).hexdigest()[:16]
    folder = base / "holov-export" / "onnxruntime" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make '{folder}' for the TensorRT provider's engines: {error.strerror}.",
            hint="Set XDG_CACHE_HOME to a folder that can be written.",
        ) from error
    return folder
