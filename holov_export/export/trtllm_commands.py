"""Which commands make a TensorRT-LLM engine, with the sizes that the budgets imply.

TensorRT-LLM's converter is a script of its examples, not of its wheel. What it is given is the language model alone
(`decoder_language_trtllm`).

Source: NVIDIA/TensorRT-LLM examples/llama/convert_checkpoint.py, examples/qwen/convert_checkpoint.py,
examples/quantization/quantize.py, examples/multimodal/README.md and tensorrt_llm/commands/build.py of
0.12.0.dev2024080600 (build.py) and 0.16.0.dev2024121000, examples/models/core/llama/convert_checkpoint.py@368f8f2,
tensorrt_llm/commands/build.py@65f1d15.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Literal

from holov_export.decoder_files import DecoderSizes
from holov_export.errors import BudgetError, UsageError
from holov_export.export.trtllm_precisions import (
    PrecisionOptions,
    TrtllmKvCache,
    TrtllmWeights,
    precision_notes,
    precision_options,
)
from holov_export.policies import Frozen
from holov_export.spec import ModelSpec, TiledImageSpec
from holov_export.targets import EngineTarget

#: names a folder of TensorRT-LLM's examples
EXAMPLES_VARIABLE = "TRTLLM_EXAMPLES"
#: where containers have them: NVIDIA's, and dusty-nv's for Jetson
_USUAL_EXAMPLES = ("/app/tensorrt_llm/examples", "/workspace/TensorRT-LLM/examples", "/opt/TensorRT-LLM/examples")
#: (script's folder in versions from 1.0 on, in older ones)
_LAYOUTS = {"llama": ("models/core/llama", "llama"), "qwen": ("models/core/qwen", "qwen")}
_CONVERTER, _QUANTIZER = "convert_checkpoint.py", "quantization/quantize.py"
#: tokens of one step unless a single prompt needs more. Source: tensorrt_llm/builder.py (BuildConfig.max_num_tokens)
_STEP_TOKENS = 8192
#: folders that the commands read and write
LANGUAGE, CONVERTED, ENGINE = "language", "converted", "engine"


class TrtllmPlan(Frozen):
    """Everything a build will do.

    Attributes:
        model: name of the bundle's model. width, vocab_size: of its language model.
        checkpoint: directory of the whole model.
        converter: "llama" or "qwen", which of the examples' scripts converts it.
        weights, kv_cache: see `trtllm_precisions`. target: what it will run on, where that was said.
        examples: their folder; None where it was not found, then the commands name a variable.
        commands: in their order, each a list of words; paths in them are relative to the folder they run in.
        notes: what a user should know.
    """

    model: str
    width: int
    vocab_size: int
    checkpoint: Path
    converter: Literal["llama", "qwen"]
    weights: TrtllmWeights
    kv_cache: TrtllmKvCache = "auto"
    tensor_parallel: int
    sizes: DecoderSizes
    target: str | None = None
    examples: Path | None
    commands: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def trtllm_plan(
    model: ModelSpec,
    checkpoint: Path,
    *,
    weights: str = "float16",
    kv_cache: str = "auto",
    batch: int = 1,
    images: int = 1,
    budget: int,
    text_tokens: int = 512,
    new_tokens: int = 512,
    tensor_parallel: int = 1,
    examples: Path | None = None,
    target: EngineTarget | None = None,
) -> TrtllmPlan:
    """The commands that make an engine.

    Args:
        model: of the bundle. checkpoint: its directory.
        weights: one of `TrtllmWeights`; how they are stored, activations are float16 unless "bfloat16".
        kv_cache: one of `TrtllmKvCache`, how keys and values are.
        batch: requests that run at once. images: of one request. budget: largest visual tokens of one image or clip.
        text_tokens: words of a prompt. new_tokens: of an answer.
        tensor_parallel: over how many GPUs the engine is spread.
        examples: folder of TensorRT-LLM's examples; None for $TRTLLM_EXAMPLES or where containers have it.
        target: what the engine will run on; None where that is not known.

    Raises:
        UnknownNameError: no such weights, or keys and values.
        BudgetError: outside of what the model has.
        UsageError: a size below 1, or more than the language model's context, or types that do not go together or that
            the target has not.
        UnsupportedModelError: weights that this language model cannot have.
    """
    sizes = sizes_from_budget(
        model, batch=batch, images=images, budget=budget, text_tokens=text_tokens, new_tokens=new_tokens
    )
    if tensor_parallel < 1 or model.decoder.heads % tensor_parallel:
        raise UsageError(f"{model.decoder.heads} attention heads cannot be spread over {tensor_parallel} GPUs.")
    qwen = bool(model.decoder.mrope_sections)
    types = precision_options(weights, kv_cache, qwen=qwen, target=target)
    found = find_examples(examples)
    converter: Literal["llama", "qwen"] = "qwen" if qwen else "llama"
    return TrtllmPlan(
        model=model.name,
        width=model.decoder.width,
        vocab_size=model.decoder.vocab_size,
        checkpoint=checkpoint,
        converter=converter,
        weights=weights,  # type: ignore[arg-type]
        kv_cache=kv_cache,  # type: ignore[arg-type]
        tensor_parallel=tensor_parallel,
        sizes=sizes,
        target=None if target is None else target.name,
        examples=found,
        commands=(_conversion(converter, types, tensor_parallel, found), _build(weights, sizes)),
        notes=_notes(precision_notes(weights, kv_cache, types, target), qwen=qwen, found=found is not None),
    )


def sizes_from_budget(
    model: ModelSpec, *, batch: int, images: int, budget: int, text_tokens: int, new_tokens: int
) -> DecoderSizes:
    """What an engine must have room for. The prompt table gets a row for every newline of LLaVA-NeXT's tiles as well.

    Raises:
        BudgetError, UsageError: see `trtllm_plan`.
    """
    asked = {"batch": batch, "images": images, "text_tokens": text_tokens, "new_tokens": new_tokens}
    for name, number in asked.items():
        if number < 1:
            raise UsageError(f"{name} is {number}, it must be at least 1.")
    most = max(model.image_tokens, model.video_tokens)
    if not 1 <= budget <= most:
        raise BudgetError(
            f"the budget {budget} is outside 1..{most}, the visual tokens of '{model.name}'.",
            hint="Choose the largest budget that requests will have.",
        )
    rows = images * (budget + _newlines(model, budget))
    longest, sequence = text_tokens + rows, text_tokens + rows + new_tokens
    if sequence > model.decoder.context:
        raise UsageError(
            f"{rows} visual rows, {text_tokens} words and an answer of {new_tokens} are {sequence} tokens, more than "
            f"the context of {model.decoder.context}.",
            hint="Lower --budget, --images, --text-tokens or --max-new-tokens.",
        )
    return DecoderSizes(
        batch=batch, images=images, budget=budget, multimodal=batch * rows, input=longest, sequence=sequence
    )


def _newlines(model: ModelSpec, budget: int) -> int:
    """Most newline rows of a picture: one for each row of tokens of its tiles that keeps a token."""
    if not isinstance(model.image, TiledImageSpec):
        return 0
    tallest = max(height // model.clip.patch_size for height, _ in model.image.pinpoints)
    return min(budget, tallest)


def find_examples(asked: Path | None = None) -> Path | None:
    """The folder of TensorRT-LLM's examples, or None.

    Raises:
        UsageError: the folder that was named has none of the scripts.
    """
    variable = os.environ.get(EXAMPLES_VARIABLE)
    named = asked or (Path(variable) if variable else None)
    if named is not None:
        if _script(named, "llama") is None and _script(named, "qwen") is None:
            raise UsageError(
                f"'{named}' has no llama/{_CONVERTER}: it is no folder of TensorRT-LLM's examples.",
                hint=f"It is the folder 'examples' of the TensorRT-LLM sources of your version; ${EXAMPLES_VARIABLE} "
                "or --trtllm-examples names it.",
            )
        return named.resolve()
    for usual in map(Path, _USUAL_EXAMPLES):
        if _script(usual, "llama") is not None:
            return usual
    return None


def _script(examples: Path, converter: str) -> Path | None:
    for layout in _LAYOUTS[converter]:
        if (examples / layout / _CONVERTER).is_file():
            return examples / layout / _CONVERTER
    return None


def _conversion(
    converter: str, types: PrecisionOptions, tensor_parallel: int, examples: Path | None
) -> tuple[str, ...]:
    """Weights of transformers to weights of TensorRT-LLM."""
    base = examples or Path(f"${EXAMPLES_VARIABLE}")
    script = (examples and _script(examples, converter)) or base / _LAYOUTS[converter][0] / _CONVERTER
    if types.quantizer:
        script = base / _QUANTIZER
    paths = ("--model_dir", LANGUAGE, "--output_dir", CONVERTED)
    return ("python", str(script), *paths, *types.options, "--tp_size", str(tensor_parallel))


def _build(weights: str, sizes: DecoderSizes) -> tuple[str, ...]:
    gemm = {"bfloat16": "bfloat16", "fp8": "fp8"}.get(weights, "float16")
    step = max(sizes.input, min(_STEP_TOKENS, sizes.batch * sizes.input))
    return (
        *("trtllm-build", "--checkpoint_dir", CONVERTED, "--output_dir", ENGINE),
        *("--gemm_plugin", gemm),
        *("--max_batch_size", str(sizes.batch)),
        *("--max_input_len", str(sizes.input)),
        *("--max_seq_len", str(sizes.sequence)),
        *("--max_num_tokens", str(step)),
        *("--max_multimodal_len", str(sizes.multimodal)),
    )


def _notes(of_types: list[str], *, qwen: bool, found: bool) -> tuple[str, ...]:
    notes = [
        f"{LANGUAGE}/ is the language model alone; holov-export writes it before the first command",
        "TensorRT-LLM 0.12 to 1.2: later versions build no engines (use --decoder trtllm-api)",
        *of_types,
    ]
    if qwen:
        notes.append("the converter knows the language model as Qwen2-VL's, which is the same; 0.12 does not know it")
    if not found:
        notes.append(
            f"${EXAMPLES_VARIABLE} is the folder 'examples' of the TensorRT-LLM sources of your version; in older ones "
            f"the script is in {_LAYOUTS['llama'][1]}/ instead of {_LAYOUTS['llama'][0]}/"
        )
    return tuple(notes)


def commands_text(plan: TrtllmPlan) -> str:
    """The commands as one would type them, with the notes as comments, for --dry-run."""
    lines = [f"# {note}" for note in plan.notes]
    for command in plan.commands:
        # a variable must stay one
        lines.append(" ".join(word if word.startswith("$") else shlex.quote(word) for word in command))
    return "\n".join(lines)
