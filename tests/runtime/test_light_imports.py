"""The runtime imports where neither torch nor transformers nor onnx are, and runs with onnxruntime alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.runtime.session import Session
from holov_export.tensors import SamplingSettings

_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in BLOCKED:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Blocker())
"""
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub")
ENGINES = ("onnxruntime", "onnxruntime_genai", "tokenizers", "jinja2", "tensorrt")
MODULES = sorted(
    f"holov_export.runtime.{path.stem}"
    for path in (Path(__file__).parents[2] / "holov_export" / "runtime").glob("*.py")
    if path.stem != "__init__"
)


def run_without(blocked: tuple[str, ...], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    text = f"BLOCKED = {set(blocked)!r}\n{_BLOCKER}\n{program}"
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", text, *arguments], cwd=root, capture_output=True, text=True, timeout=120
    )


def test_every_module_imports_with_nothing_installed() -> None:
    assert "holov_export.runtime.session" in MODULES
    lines = [f"import {name}" for name in ("holov_export.bundle", "holov_export.catalog", *MODULES)]
    run = run_without(HEAVY + ENGINES, "\n".join(lines))
    assert run.returncode == 0, run.stderr


def test_a_picture_is_seen_without_torch(toy_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path) -> None:
    photographs[0].save(tmp_path / "photo.png")
    program = (
        "from holov_export import Session\n"
        "session = Session.open(sys.argv[1], provider='cpu', threads=1)\n"
        "print(session.see(sys.argv[2]).tokens.shape, session.encoder.text_from_question('what?'))\n"
        "assert not set(sys.modules) & BLOCKED"
    )
    run = run_without((*HEAVY, "onnxruntime_genai"), program, str(toy_bundle.folder), str(tmp_path / "photo.png"))
    assert run.returncode == 0, run.stderr
    assert run.stdout == "(1, 7, 96) USER: <image>\nwhat? ASSISTANT:\n"


def test_a_question_is_answered_without_torch(
    complete_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path
) -> None:
    """An exported graph, an exported decoder and the command line's own default: the answer is the same."""
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, picture in zip(paths, photographs, strict=False):
        picture.save(path)
    question, sampling = "which one is red?", SamplingSettings(max_new_tokens=24)
    program = (
        "import json\n"
        "from holov_export import Session\n"
        "from holov_export.tensors import SamplingSettings\n"
        "with Session.open(sys.argv[1], provider='cpu', threads=1) as session:\n"
        f"    answer = session.ask(sys.argv[2:], {question!r}, quota=[9, 4], sampling={sampling!r})\n"
        "assert not {name.split('.')[0] for name in sys.modules} & BLOCKED\n"
        "print(json.dumps([answer.text, answer.token_ids, answer.visual_tokens, answer.prompt_tokens]))"
    )
    run = run_without(HEAVY, program, str(complete_bundle.folder), *map(str, paths))
    assert run.returncode == 0, run.stderr
    with Session.open(complete_bundle, provider="cpu", threads=1) as session:
        here = session.ask(paths, question, quota=[9, 4], sampling=sampling)
    assert len(here.token_ids) > 5
    assert json.loads(run.stdout) == [here.text, list(here.token_ids), [9, 4], here.prompt_tokens]


@pytest.mark.parametrize(
    ("missing", "extra"),
    [("onnxruntime", "cpu"), ("onnxruntime_genai", "cpu"), ("tokenizers", "runtime"), ("jinja2", "runtime")],
)
def test_what_is_missing_is_named_with_its_pip_line(
    answering_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path, missing: str, extra: str
) -> None:
    photographs[0].save(tmp_path / "photo.png")
    program = (
        "from holov_export import Session\n"
        "from holov_export.errors import MissingExtraError\n"
        "try:\n"
        "    Session.open(sys.argv[1], decoder='genai', provider='cpu', threads=1).ask(sys.argv[2], 'what?')\n"
        "except MissingExtraError as error:\n"
        "    print(error.exit_code, error)"
    )
    run = run_without((*HEAVY, missing), program, str(answering_bundle.folder), str(tmp_path / "photo.png"))
    assert run.returncode == 0, run.stderr
    assert (
        run.stdout == f"3 the Python package '{missing}' is not installed. Run: pip install \"holov-export[{extra}]\"\n"
    )
