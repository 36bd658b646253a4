"""TensorRT-LLM engines from a checkpoint: the commands of a plan, run one after another.

    decoders/trtllm/    decoder.json    engine/ config.json rank0.engine ...

**It has not run on the real TensorRT-LLM.** TensorRT-LLM after 1.2 builds no engines any more; there, `--decoder
trtllm-api` needs no build.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from holov_export.decoder_files import (
    DecoderFolder,
    DecoderRecord,
    atomic_decoder_folder,
    files_in,
    read_decoder,
    write_record,
)
from holov_export.errors import CheckpointError, EnvironmentFaultError
from holov_export.export.decoder_language_trtllm import write_language_checkpoint
from holov_export.export.trtllm_commands import (
    ENGINE,
    EXAMPLES_VARIABLE,
    LANGUAGE,
    TrtllmPlan,
    commands_text,
    trtllm_plan,
)
from holov_export.export.trtllm_precisions import TrtllmWeights

__all__ = ["TrtllmPlan", "TrtllmWeights", "build_trtllm", "commands_text", "trtllm_plan"]


def build_trtllm(plan: TrtllmPlan, folder: Path, *, tell: Callable[[str], None]) -> DecoderFolder:
    """Run a plan.

    Args:
        folder: of the decoder, BUNDLE/decoders/trtllm; one that is there is replaced when the new one is whole.
        tell: gets a line before each step.

    Raises:
        EnvironmentFaultError: a script or trtllm-build is missing, or fails; the message ends with its last lines.
        CheckpointError, UnsupportedModelError: the checkpoint holds no such language model.
        StorageError: the disk is full or read-only.
    """
    _check_tools(plan)
    with atomic_decoder_folder(folder) as work:
        # beside it and not in /tmp: a 7 B model needs 13 GB twice, and /tmp is often memory
        with tempfile.TemporaryDirectory(prefix=".trtllm-", dir=work.parent) as scratch:
            tell(f"write the language model of {plan.checkpoint.name}")
            write_language_checkpoint(plan.checkpoint, Path(scratch) / LANGUAGE)
            for command in plan.commands:
                tell(shlex.join(command))
                _run(command, Path(scratch))
            engine = Path(scratch) / ENGINE
            version = _check_built(engine, plan)
            shutil.move(engine, work / ENGINE)
        write_record(work, _record(plan, work, version))
    return read_decoder(folder, "trtllm")


def _check_tools(plan: TrtllmPlan) -> None:
    script = Path(plan.commands[0][1])
    if plan.examples is None or not script.is_file():
        raise EnvironmentFaultError(
            f"TensorRT-LLM's {script.name} was not found." if plan.examples is None else f"'{script}' does not exist.",
            hint=f"It is in the folder 'examples' of the TensorRT-LLM sources, of the version that is installed here; "
            f"name that folder with ${EXAMPLES_VARIABLE} or --trtllm-examples.",
        )
    if shutil.which(plan.commands[-1][0]) is None:
        raise EnvironmentFaultError(
            "the program trtllm-build is not on the PATH.",
            hint="It comes with TensorRT-LLM 0.8 to 1.2; run this in a container that has one of them.",
        )


def _run(command: Sequence[str], folder: Path) -> None:
    words = [sys.executable if word == "python" else word for word in command[:1]] + list(command[1:])
    try:
        run = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise EnvironmentFaultError(f"'{command[0]}' cannot be run: {error}") from error
    if run.returncode:
        lines = [line for line in (run.stdout + "\n" + run.stderr).splitlines() if line.strip()]
        tail = "\n".join(lines[-15:])
        raise EnvironmentFaultError(
            f"{Path(command[1]).name if command[0] == 'python' else command[0]} failed (exit status "
            f"{run.returncode}). It ended with:\n{tail}\n",
            hint="The examples must be of the TensorRT-LLM that is installed; a build needs the GPU that will run it, "
            "and memory for the whole model.",
        )


def _check_built(engine: Path, plan: TrtllmPlan) -> str:
    """The version of TensorRT-LLM that built it, once its sizes are those of the plan."""
    try:
        config = json.loads((engine / "config.json").read_text(encoding="utf-8"))
        built = config["build_config"]
        sizes = {
            "max_batch_size": plan.sizes.batch,
            "max_input_len": plan.sizes.input,
            "max_seq_len": plan.sizes.sequence,
            "max_prompt_embedding_table_size": plan.sizes.multimodal,
        }
        other = [f"{name} {built[name]} instead of {number}" for name, number in sizes.items() if built[name] != number]
        vocabulary = int(config["pretrained_config"]["vocab_size"])
        version = str(config["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentFaultError(f"trtllm-build ended well but left no engine that can be read: {error}") from error
    if other:
        raise EnvironmentFaultError(f"trtllm-build made an engine of other sizes: {', '.join(other)}.")
    if vocabulary != plan.vocab_size:  # the ids of visual rows begin behind it
        raise CheckpointError(
            f"the engine has {vocabulary} words, the bundle's language model {plan.vocab_size}.",
            hint="Is the checkpoint the one that the bundle was exported from?",
        )
    return version


def _record(plan: TrtllmPlan, work: Path, version: str) -> DecoderRecord:
    return DecoderRecord(
        kind="trtllm",
        model=plan.model,
        width=plan.width,
        vocab_size=plan.vocab_size,
        weights=plan.weights,
        main=ENGINE,
        sizes=plan.sizes,
        commands=plan.commands,
        files=files_in(work),
        tool=f"TensorRT-LLM {version}",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
