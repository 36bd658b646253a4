"""The runtime stays light: its modules import with nothing installed but the five packages of the core.

import-linter cannot tell an import at the top of a module from one inside a function, so this tries.
"""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import holov_export
from holov_export.extras import EXTRA_OF_MODULE

PACKAGE = Path(holov_export.__file__).parent
CHECKOUT = PACKAGE.parent
#: everything that an extra installs
BLOCKED = sorted({*EXTRA_OF_MODULE, "scipy", "skimage", "sklearn", "triton", "vllm"})
#: packages of which every module is light, and single light modules
LIGHT_PACKAGES = ("cli", "compile", "runtime")
LIGHT_MODULES = (
    "holov_export",
    "holov_export.assets",
    "holov_export.bundle",
    "holov_export.catalog",
    "holov_export.doctor",
    "holov_export.engine",
    "holov_export.errors",
    "holov_export.extras",
    "holov_export.gpu",
    "holov_export.pipeline",
    "holov_export.pipeline_quantized",
    "holov_export.recipe_fields",
    "holov_export.recipe_pictures",
    "holov_export.recipes",
    "holov_export.selection.geometry",
    "holov_export.selection.reference",
    "holov_export.signature",
    "holov_export.spec",
    "holov_export.storage",
    "holov_export.targets",
    "holov_export.tensors",
    "holov_export.versions",
)
PROBE = """
import importlib, importlib.abc, json, sys
blocked, modules = set(json.loads(sys.argv[1])), json.loads(sys.argv[2])

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
failures = {}
for module in modules:
    try:
        importlib.import_module(module)
    except Exception as error:
        failures[module] = f"{type(error).__name__}: {error}"
print(json.dumps({"failures": failures, "loaded": sorted(blocked & set(sys.modules))}))
"""


def light_modules() -> list[str]:
    found = list(LIGHT_MODULES)
    for name in LIGHT_PACKAGES:
        if (PACKAGE / name).is_dir():
            found.append(f"holov_export.{name}")
            found += [f"holov_export.{name}.{item.name}" for item in pkgutil.iter_modules([str(PACKAGE / name)])]
    return found


def import_without_extras(modules: list[str]) -> tuple[dict[str, str], list[str]]:
    """(failures by module, blocked packages that were loaded nevertheless)."""
    line = [sys.executable, "-c", PROBE, json.dumps(BLOCKED), json.dumps(modules)]
    run = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    return result["failures"], result["loaded"]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    failed, loaded = import_without_extras(light_modules())
    assert loaded == []
    return failed


@pytest.mark.parametrize("module", light_modules())
def test_imports_without_any_extra(module: str, failures: dict[str, str]) -> None:
    assert module not in failures, failures.get(module)


def test_the_blocker_blocks() -> None:
    failed, _ = import_without_extras(["holov_export.vision.clip"])
    assert "blocked: torch" in failed["holov_export.vision.clip"]


def extras_of_project() -> dict[str, list[str]]:
    path = CHECKOUT / "pyproject.toml"
    if not path.is_file():
        pytest.skip("not a checkout")
    tomllib = pytest.importorskip("tomllib")
    extras: dict[str, list[str]] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return extras


def test_every_module_names_an_extra_that_installs_it() -> None:
    extras = extras_of_project()
    distributions = {
        "huggingface_hub": "huggingface_hub",
        "ml_dtypes": "ml_dtypes",
        "cuda": "cuda-bindings",
        "pynvml": "nvidia-ml-py",
    }
    distributions |= {"llama_cpp": "llama-cpp-python", "skimage": "scikit-image", "sklearn": "scikit-learn"}
    for module, extra in EXTRA_OF_MODULE.items():
        wanted = distributions.get(module, module.replace("_", "-"))
        names = {re.split(r"[^\w-]", requirement, maxsplit=1)[0] for requirement in extras[extra]}
        assert wanted in names, f"'{extra}' does not install {module}"


def test_messages_name_existing_extras() -> None:
    extras = extras_of_project()
    for path in sorted([*PACKAGE.rglob("*.py"), *CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md")]):
        for named in re.findall(r"holov-export\[([a-z, -]+)\]", path.read_text(encoding="utf-8")):
            unknown = {name.strip() for name in named.split(",")} - set(extras)
            assert not unknown, f"{path.relative_to(CHECKOUT)} names the extra {unknown}"


def test_constraints_pin_every_direct_requirement() -> None:
    extras = extras_of_project()
    pinned = {
        re.split(r"==", line, maxsplit=1)[0]
        for line in (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    # of these, the last two have scripts with environments of their own: scripts/check_llamacpp, scripts/check_vllm
    not_for_cpu = {"onnxruntime-gpu", "onnxruntime-genai-cuda", "tensorrt", "llama-cpp-python", "vllm"}
    for extra, requirements in extras.items():
        for requirement in requirements:
            name = re.split(r"[^\w-]", requirement, maxsplit=1)[0].replace("_", "-").lower()
            if name != "holov-export" and name not in not_for_cpu:
                assert name in pinned, f"{name} of the extra '{extra}' has no line in constraints.txt"
