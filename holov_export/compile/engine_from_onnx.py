"""bundle + target --TensorRT--> engine: the build on the machine that will run it.

    vision.onnx --lowered--> network --profiles, flags, pins--> plan --written, hashed--> engines/<target>/

Whatever can be refused is refused before TensorRT touches the GPU, and the folder of the engine appears whole or not at
all. What needs a GPU here has run only against the stand-ins of the tests so far.
"""

from __future__ import annotations

import json
import mmap
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holov_export.bundle import Bundle, verify_artifacts
from holov_export.compile.build_watch import BuildProgress, Messages, logger_for, monitor_for, watched
from holov_export.compile.builder_config import configure, workspace_bytes
from holov_export.compile.compilation import (
    HALVED,
    CompileOptions,
    CompilePlan,
    engine_folder,
    engine_label,
    plan_from_target,
)
from holov_export.compile.float_weights import float_bytes
from holov_export.compile.graph_file import graph_from_file, weight_files, write_lowered
from holov_export.compile.lowering import lowered_for
from holov_export.compile.machine import check_gpu, this_machine
from holov_export.compile.network import network_from_graph
from holov_export.compile.precision_pins import pin_float32
from holov_export.compile.profile import add_profiles
from holov_export.compile.readiness import readiness_of
from holov_export.compile.timing_cache import attach_cache, cache_path, save_cache
from holov_export.engine import (
    ENGINE,
    LAYERS,
    SCHEMA,
    BuiltWith,
    Engine,
    EngineRecord,
    NetworkWords,
    atomic_engine_folder,
    system_name,
    write_record,
)
from holov_export.errors import EngineError, HardwareError, StorageError
from holov_export.gpu import Gpu
from holov_export.storage import sha256_of
from holov_export.targets import EngineTarget

if TYPE_CHECKING:
    from onnx import ModelProto

Tell = Callable[[str], None]


def silent(message: str) -> None:
    """A `Tell` that says nothing."""


def engine_from_bundle(
    bundle: Bundle, target: EngineTarget, options: CompileOptions | None = None, *, tell: Tell = silent
) -> Engine:
    """Build the engine of a bundle for the GPU of this machine. An older engine stays until the new one is whole.

    Args:
        bundle: opened; the hashes of its graph and weights are compared here, those of its decoder are not.
        target: must fit this GPU and this TensorRT.

    Raises:
        HardwareError: no GPU or no usable TensorRT.
        EngineError: the wrong GPU or TensorRT, a graph that TensorRT cannot have, or a build that failed.
        BudgetError: a profile that cannot be.
        IntegrityError: the graph or its weights differ from the manifest.
        StorageError: the folder cannot be written or the disk is full.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    options = options or CompileOptions()
    machine = this_machine()
    check_gpu(target, machine.gpu)
    plan = plan_from_target(bundle.manifest.plan, target, options, machine.tensorrt)
    tell("verify the graph and its weights")
    _verify_graph(bundle)
    tell(f"read the graph for TensorRT {plan.tensorrt}")
    graph = graph_for(bundle, plan, force=options.force, tell=tell)
    cache = _cache(plan, machine.gpu, options)
    folder = engine_folder(bundle.folder, engine_label(target.name, bundle), options)
    with atomic_engine_folder(folder) as work:
        _refuse_small_disk(bundle, plan, graph, work)
        with _path_of(bundle, plan, graph, work, tell) as path:
            job = _Job(machine.trt, machine.gpu, plan, graph, path, cache, options.layer_report, tell)
            tell(f"build the engine: {target.name}, TensorRT {plan.tensorrt}, {machine.gpu.name}")
            start = time.monotonic()
            _build(job, work / ENGINE)
            seconds = time.monotonic() - start
        if options.layer_report:
            tell("ask the engine for its layers")
            _write_layer_report(machine.trt, plan, work, tell)
        record = _record(bundle, plan, machine.gpu, work, seconds)
        write_record(work, record)
    return Engine(folder, record)


def _verify_graph(bundle: Bundle) -> None:
    read = (bundle.graph, bundle.weights, *weight_files(graph_from_file(bundle.vision)))
    files = tuple(item for item in bundle.manifest.artifacts if item.path in read)
    verify_artifacts(Bundle(bundle.folder, bundle.manifest.model_copy(update={"artifacts": files})))


def graph_for(bundle: Bundle, plan: CompilePlan, *, force: bool = False, tell: Tell = silent) -> ModelProto:
    """The graph that TensorRT is given, its weights left outside; checked before it is.

    Raises:
        EngineError: the readiness check found errors and `force` is False.
        UsageError: it cannot be lowered.
    """
    found = readiness_of(bundle.vision, (plan.tensorrt,)).of(plan.tensorrt).findings
    for item in found:
        if item.severity == "warning":
            tell(f"check: {item.node or 'graph'}: {item.message}")
    errors = [f"{item.node or 'graph'}: {item.message}" for item in found if item.severity == "error"]
    if errors and not force:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        checked = bundle.folder if bundle.is_default else bundle.vision
        raise EngineError(
            f"TensorRT {plan.tensorrt} would not take the graph: {errors[0]}{more}",
            hint=f"`holov-export check {checked} --tensorrt {plan.tensorrt}` says more; --force builds anyway.",
        )
    return lowered_for(graph_from_file(bundle.vision), plan.tensorrt)


@contextmanager
def _path_of(bundle: Bundle, plan: CompilePlan, graph: ModelProto, work: Path, tell: Tell) -> Iterator[Path]:
    """The path beside which the weights of a graph lie: the bundle's, or a copy in float32 while the build lasts.

    Raises:
        StorageError: the disk is full.
    """
    if not float_bytes(graph_from_file(bundle.vision), graph):
        yield bundle.vision
        return
    tell(f"write the INT8 weights as float32, which TensorRT {plan.tensorrt} wants")
    folder = work / "float32"
    try:
        yield write_lowered(bundle.vision, plan.tensorrt, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Job:
    """Everything that a build needs."""

    trt: Any
    gpu: Gpu
    plan: CompilePlan
    graph: ModelProto
    path: Path
    cache: Path | None
    layer_report: bool
    tell: Tell


def _cache(plan: CompilePlan, gpu: Gpu, options: CompileOptions) -> Path | None:
    if not options.use_timing_cache:
        return None
    return options.timing_cache or cache_path(plan.target, plan.tensorrt, gpu.sm)


def _build(job: _Job, destination: Path) -> None:
    """Build the plan and write it; nothing of the builder is left in memory afterwards."""
    messages, progress = Messages(), BuildProgress()
    logger = logger_for(job.trt, messages)
    builder = _builder(job, logger, messages)
    parsed = network_from_graph(job.trt, builder, logger, job.graph, job.path)
    config = _config(job, builder, parsed.network)
    can_cancel = job.plan.version >= (10,)
    if can_cancel:
        config.progress_monitor = monitor_for(job.trt, progress)
    messages.errors.clear()  # what it said of a foreign timing cache
    built = watched(
        lambda: builder.build_serialized_network(parsed.network, config), progress, job.tell, can_cancel=can_cancel
    )
    messages.tell_warnings(job.tell)
    if built is None:
        raise EngineError(
            f"TensorRT {job.plan.tensorrt} could not build the engine: {messages.reason()}.",
            hint="`holov-export check` looks at the graph; a smaller --workspace or --batch needs less memory.",
        )
    with destination.open("wb") as stream:
        stream.write(built)  # a buffer in TensorRT's memory: making bytes of it first would hold the plan twice
    if job.cache is not None:
        save_cache(config, job.cache, job.tell)


def _builder(job: _Job, logger: Any, messages: Messages) -> Any:
    """A builder.

    Raises:
        HardwareError: TensorRT cannot use the GPU.
    """
    try:
        return job.trt.Builder(logger)
    except TypeError as error:  # what the bindings make of a null pointer
        said = "; ".join([*messages.errors, *messages.warnings]) or "it does not say why"  # 8.6 only warns of CUDA
        raise HardwareError(
            f"TensorRT {job.plan.tensorrt} cannot use {job.gpu.name}: {said}.",
            hint="Its CUDA may be newer than the driver; `holov-export doctor` shows both.",
        ) from error


def _config(job: _Job, builder: Any, network: Any) -> Any:
    """The builder's configuration: settings, profiles, pins and timing cache of the plan."""
    config = builder.create_builder_config()
    configure(job.trt, config, job.plan, workspace_bytes(job.plan, job.gpu), detailed=job.layer_report)
    if job.plan.network in HALVED:
        pins = pin_float32(job.trt, network, job.graph)
        job.tell(f"kept in float32: {pins.layers} of {network.num_layers} layers")
    add_profiles(builder, network, config, job.plan.profiles, job.plan.inputs)
    if job.cache is not None:
        attach_cache(config, job.cache, job.tell)
    return config


def _refuse_small_disk(bundle: Bundle, plan: CompilePlan, graph: ModelProto, work: Path) -> None:
    """A plan holds the weights, and float32 copies of them are written for it; better to know now than after the build.

    Raises:
        StorageError: less is free than the weights take.
    """
    weights = sum(item.bytes for item in bundle.manifest.artifacts if item.path in (bundle.graph, bundle.weights))
    floats = float_bytes(graph_from_file(bundle.vision), graph)
    needed = (0 if plan.flags.strip_plan else weights) + (weights + floats if floats else 0)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise StorageError(
            f"the engine needs about {needed / 1e6:.0f} MB and '{work.parent}' has {free / 1e6:.0f} MB left.",
            hint="Free some, or choose another --output.",
        )


def _write_layer_report(trt: Any, plan: CompilePlan, work: Path, tell: Tell) -> None:
    """layers.json, as the finished engine tells it. It has to be loaded for that; if that fails, there is no report."""
    messages = Messages()
    try:
        text = _layers_of(trt, plan, work / ENGINE, messages)
        layers = json.dumps(json.loads(text), indent=1)
    except Exception as error:  # whatever it is, the engine itself is built, and a report is not worth it
        tell(f"no layer report: {'; '.join(messages.errors) or error}")
        return
    (work / LAYERS).write_text(layers + "\n", encoding="utf-8")


def _layers_of(trt: Any, plan: CompilePlan, path: Path, messages: Messages) -> str:
    """What TensorRT's inspector says of an engine, as JSON.

    Raises:
        EngineError: it does not load; `messages` says why.
    """
    runtime = trt.Runtime(logger_for(trt, messages))
    if plan.flags.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan brings its own runtime, and we have just built it
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError("the engine does not load beside what else is in memory.")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _network_words(plan: CompilePlan) -> NetworkWords:
    if plan.prefer and plan.network == "fp16-flag":
        return "fp16-flag, pins preferred"
    return "int8-flag, pins preferred" if plan.prefer and plan.network == "int8-flag" else plan.network


def _record(bundle: Bundle, plan: CompilePlan, gpu: Gpu, work: Path, seconds: float) -> EngineRecord:
    hashes = {item.path: item.sha256 for item in bundle.manifest.artifacts}
    return EngineRecord(
        schema_version=SCHEMA,
        target=plan.target,
        precision=plan.precision,
        quantized=plan.quantized,
        opset=plan.opset,
        profiles=plan.profiles,
        graph_sha256=hashes[bundle.graph],
        weights_sha256=hashes.get(bundle.weights, ""),
        sha256=sha256_of(work / ENGINE),
        bytes=(work / ENGINE).stat().st_size,
        built_with=BuiltWith(
            tensorrt=plan.tensorrt,
            cuda=gpu.cuda,
            gpu=gpu.name,
            sm=gpu.sm,
            system=system_name(),
            network=_network_words(plan),
            version_compatible=plan.flags.version_compatible,
            hardware_compatibility=plan.flags.hardware_compatibility,
            weight_streaming=plan.flags.weight_streaming,
            stripped=plan.flags.strip_plan,
            refittable=plan.flags.refit,
        ),
        build_seconds=round(seconds, 1),
        created=datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
    )
