"""ONNX Runtime's CUDA and TensorRT providers behind the runner: what they are told, and every silent way to the CPU.

There is no GPU here: a session on the CPU says that it runs elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from runtime.engines import pixels_for

from holov_export.bundle import Bundle
from holov_export.errors import EnvironmentFaultError, StorageError
from holov_export.runtime.ort_providers import CPU, CUDA, TENSORRT, tensorrt_options
from holov_export.runtime.runner_ort import OrtRunner
from holov_export.spec import ModelSpec

TRUE_SESSION = onnxruntime.InferenceSession


@dataclass
class Node:
    op_type: str


@dataclass
class Group:
    ep_name: str
    operators: tuple[str, ...]

    def get_nodes(self) -> list[Node]:
        return [Node(name) for name in self.operators]


@dataclass
class Machine:
    """An ONNX Runtime with GPU providers.

    Attributes:
        active: providers that a session says it has; None for those that it was asked for.
        groups: what a session says of its nodes; None: an ONNX Runtime before 1.24, which cannot say.
        fails: providers whose session cannot be made.
        asked: (providers, arguments, settings) of each session.
    """

    active: list[str] | None = None
    groups: list[Group] | None = None
    fails: tuple[str, ...] = ()
    asked: list[tuple[list[Any], dict[str, Any], str]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    fallback_off: int = 0

    def session(self, path: str, options: Any, *, providers: list[Any], **arguments: Any) -> Any:
        names = [item if isinstance(item, str) else item[0] for item in providers]
        self.asked.append((providers, arguments, _setting(options)))
        if names[0] in self.fails:
            raise RuntimeError(f"{names[0]} has no libraries")
        return Session(self, TRUE_SESSION(path, options, providers=[CPU]), names)


def _setting(options: Any) -> str:
    try:
        return str(options.get_session_config_entry("session.record_ep_graph_assignment_info"))
    except RuntimeError:
        return ""


class Session:
    def __init__(self, machine: Machine, true: Any, names: list[str]) -> None:
        self._machine, self._true, self._names = machine, true, names
        if machine.groups is not None:
            self.get_provider_graph_assignment_info = lambda: machine.groups

    def get_providers(self) -> list[str]:
        return self._machine.active or self._names

    def disable_fallback(self) -> None:
        self._machine.fallback_off += 1

    def get_inputs(self) -> Any:
        return self._true.get_inputs()

    def get_outputs(self) -> Any:
        return self._true.get_outputs()

    def run(self, names: list[str], feed: dict[str, Any]) -> Any:
        self._machine.runs.append(feed)
        return self._true.run(names, feed)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", made.session)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_built_in(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    wanted = {"cuda": "has no CUDA", "tensorrt": "has no TensorRT"}[provider]
    with pytest.raises(EnvironmentFaultError, match=f"{wanted}; it has CPUExecutionProvider") as caught:
        OrtRunner(toy_bundle, provider=provider)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("provider", "order", "name"),
    [
        ("cpu", [CPU], "(cpu)"),
        ("auto", [CUDA, CPU], "(cuda)"),
        ("cuda", [CUDA, CPU], "(cuda)"),
        ("tensorrt", [TENSORRT, CUDA, CPU], "(tensorrt)"),
    ],
)
def test_the_order_of_providers(
    machine: Machine, toy_bundle: Bundle, provider: str, order: list[str], name: str
) -> None:
    with OrtRunner(toy_bundle, provider=provider, threads=1) as runner:
        assert runner.name.endswith(name)
    ((providers, arguments, recorded),) = machine.asked
    assert [item if isinstance(item, str) else item[0] for item in providers] == order
    assert arguments == {"enable_fallback": 0}
    assert recorded == ("1" if provider in ("cuda", "tensorrt") else "")
    assert machine.fallback_off == 1


def test_options_of_the_tensorrt_provider(machine: Machine, toy_bundle: Bundle, tmp_path: Path) -> None:
    OrtRunner(toy_bundle, provider="tensorrt", threads=1).close()
    name, options = machine.asked[0][0][0]
    assert name == TENSORRT
    folder = Path(options["trt_engine_cache_path"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "cache" / "holov-export" / "onnxruntime"
    assert options == {
        "trt_profile_min_shapes": "pixel_values:1x3x56x56,budget:1,quota:1",
        "trt_profile_opt_shapes": "pixel_values:1x3x56x56,budget:7,quota:1",
        "trt_profile_max_shapes": "pixel_values:16x3x56x56,budget:64,quota:16",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }


def test_engines_of_two_graphs_lie_apart(machine: Machine, toy_bundle: Bundle, exported_bundle: Bundle) -> None:
    folders = set()
    for bundle in (toy_bundle, exported_bundle, toy_bundle):
        OrtRunner(bundle, provider="tensorrt", threads=1).close()
        folders.add(machine.asked[-1][0][0][1]["trt_engine_cache_path"])
    assert len(folders) == 2
    assert tensorrt_options(toy_bundle, Path("x"))["trt_timing_cache_path"] == "x"


def test_no_folder_for_the_engines(machine: Machine, toy_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot make .*Set XDG_CACHE_HOME"):
        OrtRunner(toy_bundle, provider="tensorrt")


# ----------------------------------------------------------------------------------------------------------- fallbacks


@pytest.mark.parametrize(
    ("provider", "active", "message"),
    [
        ("cuda", [CPU], "fell back to the CPU: it could not load its CUDA libraries"),
        ("tensorrt", [CPU], "fell back to the CPU: it could not load its TensorRT libraries"),
        ("tensorrt", [CUDA, CPU], "fell back to CUDA: it could not load its TensorRT libraries"),
    ],
)
def test_a_library_that_does_not_load(
    machine: Machine, toy_bundle: Bundle, provider: str, active: list[str], message: str
) -> None:
    machine.active = active
    with pytest.raises(EnvironmentFaultError, match=message):
        OrtRunner(toy_bundle, provider=provider)


@pytest.mark.parametrize(("provider", "own"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_heavy_work_on_the_cpu(machine: Machine, toy_bundle: Bundle, provider: str, own: str) -> None:
    machine.groups = [Group(own, ("MatMul", "Add")), Group(CPU, ("Shape", "Conv")), Group(CPU, ("LayerNormalization",))]
    with pytest.raises(EnvironmentFaultError, match="leaves Conv, LayerNormalization to the CPU"):
        OrtRunner(toy_bundle, provider=provider)


@pytest.mark.parametrize(("provider", "own"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_shape_arithmetic_on_the_cpu_is_as_it_should_be(
    machine: Machine, toy_bundle: Bundle, provider: str, own: str
) -> None:
    machine.groups = [Group(own, ("MatMul", "Conv")), Group(CPU, ("Shape", "Min", "Range", "Gather"))]
    OrtRunner(toy_bundle, provider=provider).close()


def test_a_provider_that_gets_nothing(machine: Machine, toy_bundle: Bundle) -> None:
    machine.groups = [Group(CUDA, ("MatMul",)), Group(CPU, ("Shape",))]
    with pytest.raises(EnvironmentFaultError, match="gives no part of the graph to its TensorRT provider"):
        OrtRunner(toy_bundle, provider="tensorrt")
    OrtRunner(toy_bundle, provider="cuda").close()


def test_what_the_installed_onnx_runtime_says_of_its_nodes(
    exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real session's own words, on the CPU, seen by the check for CUDA."""
    if not hasattr(TRUE_SESSION, "get_provider_graph_assignment_info"):
        pytest.skip("ONNX Runtime before 1.24 cannot say")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])

    def session(path: str, options: Any, *, providers: list[Any], **arguments: Any) -> Any:
        made = TRUE_SESSION(path, options, providers=[CPU], **arguments)
        monkeypatch.setattr(made, "get_providers", lambda: [CUDA, CPU])
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(EnvironmentFaultError, match=r"leaves Conv, .*MatMul to the CPU"):
        OrtRunner(exported_bundle, provider="cuda")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_raises(
    machine: Machine, toy_bundle: Bundle, provider: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.fails = (CUDA, TENSORRT)
    with pytest.raises(EnvironmentFaultError, match=r"cannot load vision\.onnx: .* has no libraries"):
        OrtRunner(toy_bundle, provider=provider)
    assert len(machine.asked) == 1
    assert capsys.readouterr().out == ""


def test_auto_takes_the_cpu_where_cuda_raises(
    machine: Machine, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.fails = (CUDA,)
    with OrtRunner(toy_bundle, threads=1) as runner:
        assert runner.name.endswith("(cpu)")
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_batch_past_the_tensorrt_profile_is_run_in_parts(
    machine: Machine, toy_bundle: Bundle, llava_spec: ModelSpec
) -> None:
    pixels, quota = pixels_for(llava_spec, 35), [1 + index % 5 for index in range(35)]
    with OrtRunner(toy_bundle, provider="tensorrt", threads=1, saliency=True) as runner:
        got = runner.run(pixels, 5, quota)
        assert [len(feed["pixel_values"]) for feed in machine.runs] == [16, 16, 3]
        assert all(feed["budget"].tolist() == [5] for feed in machine.runs)
        assert got.counts.tolist() == quota
    with OrtRunner(toy_bundle, provider="cpu", threads=1, saliency=True) as whole:
        wanted = whole.run(pixels, 5, quota)
    assert len(machine.runs) == 4
    np.testing.assert_allclose(got.tokens, wanted.tokens, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.positions, wanted.positions)
    assert got.saliency is not None
    assert got.saliency.shape == (35, 64)


def test_the_budget_stays_on_the_host(machine: Machine, toy_bundle: Bundle, llava_spec: ModelSpec) -> None:
    """Inputs go in as numpy arrays: ONNX Runtime moves those that a GPU kernel reads, and no others."""
    with OrtRunner(toy_bundle, provider="cuda", threads=1) as runner:
        runner.run(pixels_for(llava_spec, 2), 5)
    assert {name: type(value) for name, value in machine.runs[0].items()} == dict.fromkeys(
        ("pixel_values", "budget", "quota"), np.ndarray
    )
