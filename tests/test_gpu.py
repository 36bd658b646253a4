"""What the CUDA driver says, with drivers that are not there, that refuse and that answer."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from holov_export import doctor, gpu
from holov_export.errors import HardwareError

ORIN = gpu.Gpu(name="Orin", sm=87, memory_bytes=61_000_000_000, integrated=True, cuda="12.6")


class FakeDriver:
    """libcuda's functions as `gpu` calls them; `refuses` gives some of them an error code."""

    def __init__(self, devices: int = 1, **refuses: int) -> None:
        self.devices, self.refuses = devices, refuses

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if name not in self.refuses:
                self._answer(name, arguments)
            return self.refuses.get(name, 0)

        return call

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "cuDeviceGetName":
            arguments[0].value = ORIN.name.encode()
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = {75: 8, 76: 7, 18: 1}[arguments[1]]
        elif name != "cuInit":
            answers = {"cuDeviceGetCount": self.devices, "cuDeviceTotalMem_v2": ORIN.memory_bytes}
            arguments[0]._obj.value = answers.get(name, 12060 if name == "cuDriverGetVersion" else 0)


def found_with(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> gpu.Gpu | gpu.NoGpu:
    def load(name: str) -> FakeDriver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    return gpu.probe()


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_with(monkeypatch, FakeDriver()) == ORIN
    assert gpu.require_gpu() == ORIN
    assert doctor._cuda().found == "Orin, sm_87, 57 GiB shared, CUDA 12.6"


@pytest.mark.parametrize(
    ("driver", "state", "reason"),
    [
        (None, "missing", "there is no CUDA driver"),
        (FakeDriver(cuInit=100), "missing", "sees no device"),
        (FakeDriver(devices=0), "missing", "sees no device"),
        (FakeDriver(cuInit=803), "fault", "cuInit returned 803"),
        (FakeDriver(cuDeviceGet=101), "fault", "does not describe its first device"),
        (FakeDriver(cuDeviceGetAttribute=1), "fault", "does not describe its first device"),
        (FakeDriver(cuDeviceTotalMem_v2=1), "fault", "does not describe its first device"),
    ],
)
def test_no_gpu_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None, state: str, reason: str
) -> None:
    """A driver that is there and refuses is a fault; a machine without a GPU lacks nothing that it must have."""
    found = found_with(monkeypatch, driver)
    assert isinstance(found, gpu.NoGpu)
    assert reason in found.reason
    finding = doctor._cuda()
    assert (finding.state, finding.found) == (state, found.reason)
    with pytest.raises(HardwareError, match=r"no usable NVIDIA GPU: ") as caught:
        gpu.require_gpu()
    assert caught.value.exit_code == 3
