from __future__ import annotations

import sys
from pathlib import Path

import pytest

from holov_export.errors import MissingExtraError
from holov_export.extras import EXTRA_OF_MODULE, is_installed, require


def test_require_returns_the_module() -> None:
    assert require("json").loads("1") == 1


@pytest.mark.parametrize(("module", "extra"), EXTRA_OF_MODULE.items())
def test_missing_package_names_the_pip_line(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    with pytest.raises(MissingExtraError) as caught:
        require(module)
    assert f"'{module}' is not installed" in caught.value.message
    assert f'pip install "holov-export[{extra}]"' in caught.value.hint
    assert caught.value.exit_code == 3


def test_what_an_extra_leaves_out_of_an_old_python_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(MissingExtraError) as caught:
        require("onnxruntime_genai")
    assert caught.value.hint == "It needs Python 3.11 or newer."


def test_package_of_no_extra_is_named_itself() -> None:
    with pytest.raises(MissingExtraError, match="pip install no_such_package_here"):
        require("no_such_package_here")


def test_a_fault_inside_an_installed_package_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package_here.py").write_text("import no_such_package_here\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_here"):
        require("broken_package_here")


def test_is_installed() -> None:
    assert is_installed("json")
    assert not is_installed("no_such_package_here")
