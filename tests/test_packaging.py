"""The wheel holds everything, and installs light on the oldest Python: there it runs the vision graph and stitches.

Slow: builds a wheel and makes a fresh virtual environment from the package index. The oldest Python is `python3.10` or
what HOLOV_EXPORT_OLDEST_PYTHON names; without one the present interpreter stands in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from holov_export.bundle import Bundle

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parent.parent


def run(*line: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(
        list(map(str, line)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def oldest_python() -> str:
    for candidate in (os.environ.get("HOLOV_EXPORT_OLDEST_PYTHON"), "python3.10"):
        try:
            if candidate and subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
                return candidate
        except OSError:
            continue
    return sys.executable


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, CHECKOUT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def light_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and its extra `cpu`: no torch, no transformers, no onnx."""
    folder = tmp_path_factory.mktemp("light") / "venv"
    run(oldest_python(), "-m", "venv", folder, cwd=folder.parent)
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
import json, sys
from holov_export import Session
from holov_export.runtime.stitch import stitch

with Session.open(sys.argv[1], decoder="none", provider="cpu") as session:
    tokens = session.see(sys.argv[2], budget=5, quota=[3])
    text = session.encoder.text_from_question("what is shown?")
    prompt = stitch(session.encoder, text, [tokens.rows(0)])
print(json.dumps({"shape": tokens.tokens.shape, "counts": tokens.counts.tolist(), "rows": prompt.rows.shape,
                  "placeholders": int((prompt.input_ids == prompt.image_token_id).sum())}))
"""


def test_it_runs_a_vision_graph_and_stitches(light_python: Path, toy_bundle: Bundle, tmp_path: Path) -> None:
    Image.effect_mandelbrot((90, 70), (-2.0, -1.5, 1.0, 1.5), 40).convert("RGB").save(tmp_path / "picture.png")
    result = json.loads(run(light_python, "-c", SEE, toy_bundle.folder, tmp_path / "picture.png", cwd=tmp_path))
    width = toy_bundle.manifest.plan.model.decoder.width
    assert result == {"shape": [1, 5, width], "counts": [3], "rows": [3, width], "placeholders": 3}


def test_the_command_line_starts(light_python: Path, tmp_path: Path) -> None:
    command = light_python.with_name("holov-export")
    assert "export" in run(command, "--help", cwd=tmp_path)
    assert "holov-official" in run(command, "methods", cwd=tmp_path)
