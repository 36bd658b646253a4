"""What a user asks an export for, and the plan that it becomes before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holov_export.bundle import check_target, graph_file
from holov_export.catalog import checkpoint_from_reference, reference_from_name
from holov_export.errors import UsageError
from holov_export.policies import SelectionPolicy
from holov_export.spec import (
    CheckpointSource,
    DecoderPrecision,
    ExportPlan,
    GraphPlan,
    Int4Settings,
    ModelSpec,
    Precision,
    Quantization,
    QuantizedType,
    check_cuts,
    cuts_from_text,
    opset_of,
)

#: of `QuantizeRequest.keep`
AUTO = "auto"


@dataclass(frozen=True)
class GraphRequest:
    """A further vision graph: its rule, and `select_layer` as in `ExportRequest`."""

    policy: SelectionPolicy
    select_layer: str | None = None


@dataclass(frozen=True)
class QuantizeRequest:
    """How a user wants the vision graphs quantised.

    Attributes:
        type, engine: see `spec.Quantization`.
        recipe: a name or a TOML file (`recipes.recipe_from_name`). It also says what may be lost.
        pictures: folder of the recipe's pictures, for recipes that have none of their own.
        smoothing: instead of the recipe's; 0 for none.
        keep: beside what the recipe keeps; "auto" measures which layers must be kept.
        questions: a file of questions that answers are compared on; None for those at hand.
        accept_loss: write the bundle even if it lost more than the recipe allows.
    """

    type: QuantizedType
    engine: Literal["tensorrt", "cpu"] = "tensorrt"
    recipe: str = "smoke-8"
    pictures: Path | None = None
    smoothing: float | None = None
    keep: tuple[str, ...] = ()
    questions: Path | None = None
    accept_loss: bool = False


@dataclass(frozen=True)
class CacheRequest:
    """Keys and values of the embedded decoder in 8 bits: their scales come from answers about a recipe's pictures.

    Attributes:
        recipe, pictures: as in `QuantizeRequest`.
    """

    recipe: str = "smoke-8"
    pictures: Path | None = None


@dataclass(frozen=True)
class ExportRequest:
    """What a user asks for.

    Attributes:
        model: a catalogue name, a directory or OWNER/REPO[@REVISION].
        policy: the rule of the graph that runs unless another one is asked for.
        select_layer: where in the tower it cuts, as `spec.cuts_from_text` reads it; None for the feature layer. A
            budget that it names, or that of a further graph, is the bundle's.
        also: further graphs over the same weights.
        output: folder of the bundle; None means MODEL-METHOD-PRECISION in the working directory.
        decoder: precision of the embedded decoder; None leaves it out.
        decoder_provider: "cpu" or "cuda", what the decoder's graph is built for.
        verify: write a parity report and refuse the export if it fails.
        newlines: the rows of a picture that keep a token keep their newline embedding (LLaVA-NeXT).
        decoder_int4: of an int4 decoder; None for the usual way.
        decoder_kv_cache: keys and values in 8 bits; None leaves them in the type of the activations.
        questions: a file of questions that a decoder of few bits is compared on, and that scales of its keys and
            values also come from; None for those at hand.
        quantize: the vision graphs; None leaves them in `precision`.
    """

    model: str
    policy: SelectionPolicy
    precision: Precision
    decoder: DecoderPrecision | None
    output: Path | None = None
    overwrite: bool = False
    verify: bool = True
    decoder_provider: Literal["cpu", "cuda"] = "cpu"
    select_layer: str | None = None
    also: tuple[GraphRequest, ...] = ()
    newlines: bool = True
    decoder_int4: Int4Settings | None = None
    decoder_kv_cache: CacheRequest | None = None
    questions: Path | None = None
    quantize: QuantizeRequest | None = None


def plan_from_request(request: ExportRequest) -> tuple[ExportPlan, Path]:
    """Resolve everything an export will do, and refuse what it would refuse; fetches configuration files only.

    Returns:
        (plan, absolute output folder).

    Raises:
        UsageError, EnvironmentFaultError: see `catalog`, `export.checkpoint` and `bundle.check_target`.
    """
    from holov_export.export.checkpoint import config_sha256, spec_from_checkpoint
    from holov_export.export.decoder_onnx import check_language_model, check_precision, int4_settings

    if request.decoder is not None:
        check_precision(request.decoder, request.decoder_provider)
    reference = reference_from_name(request.model)
    checkpoint = checkpoint_from_reference(reference, weights=False)
    spec = spec_from_checkpoint(checkpoint.folder, reference.label)
    if request.decoder is not None:
        check_language_model(checkpoint.folder, spec.decoder)
    source = CheckpointSource(
        kind=checkpoint.source.kind,
        name=checkpoint.source.name,
        revision=checkpoint.source.revision,
        config_sha256=config_sha256(checkpoint.folder),
    )
    (graph, *also), budget = _graphs_from_request(request, spec)
    quantization = None if request.quantize is None else quantization_from_request(request.quantize, request.precision)
    int4 = int4_settings(checkpoint.folder, request.decoder, request.decoder_int4)
    if request.decoder_kv_cache is not None:
        _check_cache(request)
    plan = ExportPlan(
        model=spec,
        source=source,
        policy=graph.policy,
        cuts=graph.cuts,
        also=tuple(also),
        budget=budget,
        precision=request.precision,
        decoder=request.decoder,
        decoder_provider=request.decoder_provider,
        quantization=quantization,
        decoder_int4=int4,
        decoder_kv_cache="float" if request.decoder_kv_cache is None else "int8",
        opset=opset_of(request.precision, quantization),
        newlines=request.newlines,
    )
    output = (request.output or Path(usual_name(plan))).absolute()
    check_target(output, overwrite=request.overwrite)
    return plan, output


def _check_cache(request: ExportRequest) -> None:
    """Refuse 8-bit keys and values without a decoder, or whose scales cannot be found on this machine's CPU.

    Raises:
        HolovExportError: also of the recipe and its pictures, see `recipes`.
    """
    from holov_export.recipes import pictures_of, recipe_from_name

    assert request.decoder_kv_cache is not None
    if request.decoder is None:
        raise UsageError("there are no keys and values without a decoder.", hint="Leave --decoder-kv-cache away.")
    if request.precision is Precision.BF16:
        raise UsageError(
            "scales of 8-bit keys and values come from answers on the CPU, where no bf16 vision graph runs.",
            hint="Choose --fp16 or --fp32.",
        )
    pictures_of(recipe_from_name(request.decoder_kv_cache.recipe), request.decoder_kv_cache.pictures)


def usual_name(plan: ExportPlan) -> str:
    """MODEL-METHOD-PRECISION: what a bundle's folder is called when nobody says."""
    return f"{plan.model.name}-{_file_name(plan.method)}-{plan.precision_name}"


def quantization_from_request(request: QuantizeRequest, precision: Precision) -> Quantization:
    """What a plan says of a quantisation. Whether a kept layer exists is seen when there is a graph.

    Raises:
        UnknownNameError, UsageError: the recipe; or a combination that no engine runs.
    """
    from holov_export.recipes import recipe_from_name, recipe_sha256

    recipe = recipe_from_name(request.recipe)
    if request.engine == "cpu" and (request.type is not QuantizedType.INT8 or precision is not Precision.FP32):
        raise UsageError(
            f"there is no {precision.value} graph with {request.type.value} products for a CPU.",
            hint="A CPU computes in float32 and int8: --int8 --quantize-for cpu, without --fp16 or --bf16.",
        )
    smoothing = recipe.smoothing if request.smoothing is None else request.smoothing
    kept = tuple(dict.fromkeys([*recipe.keep, *(name for name in request.keep if name != AUTO)]))
    if request.engine == "cpu" and not smoothing:  # its scales are found at run time
        return Quantization(type=request.type, engine="cpu", keep=kept)
    return Quantization(
        type=request.type,
        engine=request.engine,
        recipe=recipe.name,
        recipe_sha256=recipe_sha256(recipe),
        algorithm=recipe.algorithm,
        smoothing=smoothing or None,
        keep=kept,
    )


def _graphs_from_request(request: ExportRequest, spec: ModelSpec) -> tuple[list[GraphPlan], int | None]:
    """(all graphs, the budget that their schedules name).

    Raises:
        UsageError: see `_graph_from_request`; two have the same name, or name different budgets.
    """
    asked = (GraphRequest(request.policy, request.select_layer), *request.also)
    found = [_graph_from_request(further, spec) for further in asked]
    names = [graph.name for graph, _ in found]
    if len(set(names)) < len(names):
        raise UsageError(f"two graphs have the same name: {', '.join(names)}.", hint="Name each rule once.")
    budgets = {budget for _, budget in found if budget is not None}
    if len(budgets) > 1:
        raise UsageError(
            f"the graphs name different budgets: {', '.join(map(str, sorted(budgets)))}.",
            hint="A bundle has one usual budget; name it behind the last layer of one graph.",
        )
    return [graph for graph, _ in found], next(iter(budgets), None)


def _graph_from_request(request: GraphRequest, spec: ModelSpec) -> tuple[GraphPlan, int | None]:
    """(the graph, the budget that its schedule names).

    Raises:
        UsageError: the layers do not parse, do not exist, or the rule cannot decide there or for this model.
    """
    method = request.policy.method
    if _is_packed(spec) and not request.policy.packs:
        raise UsageError(
            f"'{method}' cannot decide where pictures have unequal numbers of tokens, as in '{spec.name}'.",
            hint="Choose another rule: holov-export methods",
        )
    if request.select_layer and _is_packed(spec):
        raise UsageError(
            f"the tower of '{spec.name}' selects at its last layer; --select-layer is for square pictures.",
            hint="Leave --select-layer away.",
        )
    try:
        cuts, budget = cuts_from_text(request.select_layer, spec.clip) if request.select_layer else ((), None)
        check_cuts(request.policy, cuts)
    except ValueError as error:
        raise UsageError(
            f"the layers '{request.select_layer}' of '{method}' are wrong: {error}.",
            hint="Write a layer such as 12, or a schedule such as 12:256,22:64.",
        ) from error
    return GraphPlan(policy=request.policy, cuts=cuts), budget


def _is_packed(spec: ModelSpec) -> bool:
    """One of the model's graphs is packed; see `ExportPlan.packed`."""
    return spec.image.kind != "square" or spec.video.kind != "none"


def _file_name(method: str) -> str:
    return graph_file(method, "", "").strip("-")
