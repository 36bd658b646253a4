"""The wheel holds everything and installs light; an exported bundle sees and answers there as it does here.

Slow: builds a wheel and makes fresh virtual environments from the package index, with the present Python, with the
oldest that is supported, for which neither a newer ONNX Runtime nor ONNX Runtime GenAI is to be had, and with 3.12.
Those are `python3.10` and `python3.12`, or what HOLOV_EXPORT_OLDEST_PYTHON and HOLOV_EXPORT_PYTHON_3_12 name; where one
is missing its tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.runtime.session import Session
from holov_export.runtime.stitch import stitch
from holov_export.tensors import SamplingSettings

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parent.parent
#: variable that names the interpreter, what it is called on the PATH, its version
OTHERS = {
    "oldest": ("HOLOV_EXPORT_OLDEST_PYTHON", "python3.10", (3, 10)),
    "3.12": ("HOLOV_EXPORT_PYTHON_3_12", "python3.12", (3, 12)),
}
PYTHONS = ("oldest", "present", "3.12")
#: GenAI has no wheel for an older one on ARM, so it is not asked for there
FIRST_WITH_GENAI = (3, 11)


def ended(line: Sequence[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        list(map(str, line)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900
    )


def run(*line: str | Path, cwd: Path) -> str:
    done = ended(line, cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def version_of(python: str | Path) -> tuple[int, ...] | None:
    """(major, minor) of an interpreter; None if it does not start."""
    line = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else None


def interpreter(name: str) -> str:
    """One of `PYTHONS`; its test is skipped where it is missing."""
    if name == "present":
        return sys.executable
    variable, usual, wanted = OTHERS[name]
    python = os.environ.get(variable, usual)
    version = version_of(python)
    if version is None:
        pytest.skip(f"'{python}' does not start; name a Python {'.'.join(map(str, wanted))} in {variable}")
    assert version == wanted, f"'{python}' is Python {version}"
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, CHECKOUT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=PYTHONS)
def light_python(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and its extra `cpu`: no torch, no transformers, no onnx."""
    base = interpreter(request.param)
    folder = tmp_path_factory.mktemp("light") / "venv"
    run(base, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    constraints = CHECKOUT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, f"{wheel}[cpu]", cwd=folder.parent)
    return python


def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    package = CHECKOUT / "holov_export"
    modules = {path.relative_to(CHECKOUT).as_posix() for path in package.rglob("*.py")}
    data = {
        path.relative_to(CHECKOUT).as_posix()
        for path in (package / "data").rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    edited = {
        f"holov_export/data/{path.relative_to(CHECKOUT).as_posix()}"
        for name in ("engines", "calibration")
        for path in (CHECKOUT / name).rglob("*")
        if path.is_file()
    }
    assert modules | data | edited | {"holov_export/py.typed"} <= inside
    outside = {name for name in inside if not name.startswith(("holov_export/", "holov_export-"))}
    assert not outside
    licences = {name.rsplit("/", 1)[-1] for name in inside if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


IMPORTS = """
import importlib, pkgutil, sys
import holov_export
from holov_export.assets import data_folder

root = holov_export.__path__[0]
for folder in ("cli", "runtime"):
    for item in pkgutil.iter_modules([f"{root}/{folder}"]):
        importlib.import_module(f"holov_export.{folder}.{item.name}")
for name in ("engines", "calibration", "demo-scenes"):
    assert str(data_folder(name)).startswith(root), name
heavy = {"torch", "transformers", "onnx", "onnxscript"} & set(sys.modules)
assert not heavy, heavy
"""


def test_everything_light_imports(light_python: Path, tmp_path: Path) -> None:
    run(light_python, "-c", IMPORTS, cwd=tmp_path)


SEE = """
import importlib.util, sys
import numpy as np
from holov_export import Session
from holov_export.runtime.stitch import stitch

assert not [name for name in ("torch", "transformers", "onnx") if importlib.util.find_spec(name)]
with Session.open(sys.argv[1], decoder="none", provider="cpu") as session:
    seen = session.see(sys.argv[2:4], budget=9, quota=[9, 4])
    text = session.encoder.text_from_question("what is shown?", images=2)
    prompt = stitch(session.encoder, text, [seen.rows(0), seen.rows(1)])
np.savez(sys.argv[4], tokens=seen.tokens, positions=seen.positions, counts=seen.counts, saliency=seen.saliency,
         input_ids=prompt.input_ids, rows=prompt.rows)
"""


def test_an_exported_graph_gives_what_it_gives_here(
    light_python: Path, exported_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path
) -> None:
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, picture in zip(paths, photographs, strict=False):
        picture.save(path)
    run(light_python, "-c", SEE, exported_bundle.folder, *paths, tmp_path / "there.npz", cwd=tmp_path)
    with np.load(tmp_path / "there.npz") as file:
        there = dict(file)
    with Session.open(exported_bundle, decoder="none", provider="cpu") as session:
        here = session.see(paths, budget=9, quota=[9, 4])
        text = session.encoder.text_from_question("what is shown?", images=2)
        prompt = stitch(session.encoder, text, [here.rows(0), here.rows(1)])
    assert there["counts"].tolist() == here.counts.tolist() == [9, 4]
    np.testing.assert_array_equal(there["positions"], here.positions)
    np.testing.assert_array_equal(there["input_ids"], prompt.input_ids)
    # another release of ONNX Runtime may add in another order
    np.testing.assert_allclose(there["saliency"], here.saliency, atol=1e-6)
    np.testing.assert_allclose(there["tokens"], here.tokens, atol=1e-5)
    np.testing.assert_allclose(there["rows"], prompt.rows, atol=1e-5)
    assert np.abs(here.tokens).max() > 0.01


BUDGETS = (1, 9, 64)


def ask(python: Path, bundle: Bundle, picture: Path, budget: int, decoder: str) -> subprocess.CompletedProcess[str]:
    line = [python.with_name("holov-export"), "ask", bundle.folder, picture, "what is shown?", "--json"]
    line += ["--budget", str(budget), "--max-new-tokens", "24", "--provider", "cpu", "--decoder", decoder]
    return ended(line, picture.parent)


def test_the_embedded_decoder_answers_as_it_does_here(
    light_python: Path, complete_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path
) -> None:
    """Through plain ONNX Runtime everywhere, through GenAI from Python 3.11 on; `auto` is what is there."""
    picture = tmp_path / "0.png"
    photographs[0].save(picture)
    settings = SamplingSettings(max_new_tokens=24)
    with Session.open(complete_bundle, decoder="genai", provider="cpu") as session:
        here = {budget: session.ask(picture, "what is shown?", budget=budget, sampling=settings) for budget in BUDGETS}
    assert len({answer.token_ids for answer in here.values()}) == len(BUDGETS), "equal answers would prove little"
    has_genai = (version_of(light_python) or ()) >= FIRST_WITH_GENAI
    for decoder in ("ort", "auto", *(["genai"] if has_genai else [])):
        for budget, wanted in here.items():
            done = ask(light_python, complete_bundle, picture, budget, decoder)
            assert done.returncode == 0, f"{decoder}: {done.stderr}"
            there = json.loads(done.stdout)
            assert (there["token_ids"], there["text"]) == (list(wanted.token_ids), wanted.text), decoder
            assert there["visual_tokens"] == [budget]
    if not has_genai:
        refused = ask(light_python, complete_bundle, picture, 9, "genai")
        assert refused.returncode == 3
        assert "needs Python 3.11" in refused.stderr


def resolved(python: str, wheel: Path, folder: Path) -> dict[str, str]:
    """What pip would install for `holov-export[cpu]` into an empty environment, without our constraints."""
    run(python, "-m", "venv", folder / "venv", cwd=folder)
    report_file = folder / "report.json"
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--dry-run", "--report", report_file]
    run(*pip, f"{wheel}[cpu]", cwd=folder)
    report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}


@pytest.mark.parametrize("name", PYTHONS)
def test_a_users_install_resolves(name: str, wheel: Path, tmp_path: Path) -> None:
    python = interpreter(name)
    found = resolved(python, wheel, tmp_path)
    version = tuple(map(int, found["onnxruntime"].split(".")[:2]))
    assert version >= (1, 23)
    assert ("onnxruntime-genai" in found) is ((version_of(python) or ()) >= FIRST_WITH_GENAI)
    assert {"numpy", "pillow", "pydantic", "tokenizers", "jinja2"} <= set(found)
    assert not {"torch", "transformers", "onnx", "onnxscript"} & set(found)
    if name == "oldest":
        assert version == (1, 23), "ONNX Runtime has releases for Python 3.10 again: raise what the graphs may use"


def test_the_command_line_starts(light_python: Path, tmp_path: Path) -> None:
    command = light_python.with_name("holov-export")
    assert "export" in run(command, "--help", cwd=tmp_path)
    assert "holov-official" in run(command, "methods", cwd=tmp_path)
