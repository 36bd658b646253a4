"""The wheel holds everything and installs light; an exported vision graph runs there and gives what it gives here.

Slow: builds a wheel and makes fresh virtual environments from the package index, one with the present Python and one
with the oldest that is supported. That is `python3.10`, or what HOLOV_EXPORT_OLDEST_PYTHON names; without one its tests
are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.runtime.session import Session
from holov_export.runtime.stitch import stitch

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)


def run(*line: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(
        list(map(str, line)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def version_of(python: str | Path) -> tuple[int, ...] | None:
    """(major, minor) of an interpreter; None if it does not start."""
    line = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        ended = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return tuple(map(int, ended.stdout.split())) if ended.returncode == 0 else None


def oldest_python() -> str:
    name = os.environ.get("HOLOV_EXPORT_OLDEST_PYTHON", "python3.10")
    version = version_of(name)
    if version is None:
        pytest.skip(f"'{name}' does not start; name a Python 3.10 in HOLOV_EXPORT_OLDEST_PYTHON")
    assert version == OLDEST, f"'{name}' is Python {version}"
    return name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, CHECKOUT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["oldest", "present"])
def light_python(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and its extra `cpu`: no torch, no transformers, no onnx."""
    base = oldest_python() if request.param == "oldest" else sys.executable
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


def test_the_command_line_starts(light_python: Path, tmp_path: Path) -> None:
    command = light_python.with_name("holov-export")
    assert "export" in run(command, "--help", cwd=tmp_path)
    assert "holov-official" in run(command, "methods", cwd=tmp_path)
