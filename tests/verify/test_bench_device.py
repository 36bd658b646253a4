"""What NVML and tegrastats say, and what is said where neither is there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holov_export.verify import device_monitor
from holov_export.verify.device_monitor import (
    NoMonitor,
    NvmlMonitor,
    Snapshot,
    TegrastatsMonitor,
    monitor_of_this_machine,
    nvml_snapshot,
    snapshot_of_line,
    summary_of,
)

# lines of real boards
ORIN_NANO = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) SWAP 369/3810MB (cached 8MB) "
    "CPU [38%@1497,2%@729,1%@729,0%@729,1%@729,0%@729] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] NVDEC off NVJPG off VIC "
    "off OFA off APE 200 cpu@57.125C soc2@55.093C soc0@56.625C gpu@58.25C tj@58.25C "
    "VDD_IN 8535mW/5251mW VDD_CPU_GPU_CV 2512mW/1944mW VDD_SOC 2720mW/3659mW"
)
AGX_ORIN = (
    "RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,off] EMC_FREQ 3%@2133 "
    "GR3D_FREQ 12%@[1300,1298] NVENC off VIC 36%@115 APE 174 CV0@-256C GPU@-256C tj@52.562C "
    "VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
)
THOR = "RAM 4722/7844MB (lfb 1x512kB) EMC_FREQ 2%@1866 GR3D_FREQ @[1000,1000,1000] APE 150"
XAVIER_BEFORE_4_6 = (
    "RAM 1766/3964MB (lfb 197x4MB) SWAP 0/2048MB (cached 0MB) CPU [24%@1224] EMC_FREQ 0% GR3D_FREQ 5% "
    "GPU@23.5C VDD_IN 2545/2547 VDD_SOC 1104/1104"
)


class TestTegrastats:
    def test_orin_nano(self) -> None:
        found = snapshot_of_line(ORIN_NANO)
        assert found is not None
        assert (found.sm_clock_mhz, found.load_percent, found.memory_clock_mhz) == (612, 99, 2133)
        assert (found.power_w, found.memory_used_mb, found.temperature_c) == (8.535, 6712, 58.25)
        assert found.rails == (("VDD_IN", 8.535), ("VDD_CPU_GPU_CV", 2.512), ("VDD_SOC", 2.720))

    def test_agx_orin_has_no_rail_of_the_whole_module_and_none_is_made_up(self) -> None:
        found = snapshot_of_line(AGX_ORIN)
        assert found is not None
        assert found.power_w is None
        assert found.rails == (("VDD_GPU_SOC", 5.139), ("VDD_CPU_CV", 3.268), ("VIN_SYS_5V0", 5.5))
        assert (found.sm_clock_mhz, found.load_percent) == (1300, 12)
        assert found.temperature_c is None  # -256: the sensor is off

    def test_thor_gives_clocks_without_a_load(self) -> None:
        found = snapshot_of_line(THOR)
        assert found is not None
        assert (found.sm_clock_mhz, found.load_percent, found.rails) == (1000, None, ())

    def test_older_ones_have_no_units_and_no_clocks(self) -> None:
        found = snapshot_of_line(XAVIER_BEFORE_4_6)
        assert found is not None
        assert (found.sm_clock_mhz, found.load_percent, found.memory_clock_mhz) == (None, 5, None)
        assert (found.power_w, found.temperature_c) == (2.545, 23.5)

    @pytest.mark.parametrize("line", ["", "tegrastats: not permitted", "NVDEC off"])
    def test_other_lines_are_none(self, line: str) -> None:
        assert snapshot_of_line(line) is None

    def test_the_program_is_read_while_something_runs(self, tmp_path: Path) -> None:
        program = tmp_path / "tegrastats"
        program.write_text(
            f"#!{sys.executable}\nimport sys, time\nassert sys.argv[1:] == ['--interval', '20']\n"
            f"while True:\n    print({ORIN_NANO!r}, flush=True)\n    time.sleep(0.01)\n",
            encoding="utf-8",
        )
        program.chmod(0o755)
        with TegrastatsMonitor(str(program), 0.02) as monitor:
            began = time.monotonic()
            while monitor.reading() is None and time.monotonic() - began < 20:
                time.sleep(0.01)
        found = monitor.reading()
        assert found is not None
        assert found.source == "tegrastats" and found.samples >= 1
        assert found.power_w is not None and found.power_w.mean == 8.535
        assert [rail.name for rail in found.rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]

    def test_a_program_that_does_not_start_gives_nothing(self, tmp_path: Path) -> None:
        with TegrastatsMonitor(str(tmp_path / "tegrastats")) as monitor:
            pass
        assert monitor.reading() is None


class FakeNvml:
    """As much of pynvml as is asked for; a card without a fan, a power meter or a load counter."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, *, devices: int = 2, broken: str = "") -> None:
        self.devices, self.broken, self.asked = devices, broken, 0

    def nvmlInit(self) -> None:  # noqa: N802  the library's names
        if self.broken:
            raise self.NVMLError(self.broken)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"gpu {index}"

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        return name

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:  # noqa: N802
        self.asked += 1
        return 1980 if clock == self.NVML_CLOCK_SM else 3201

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=512 * 2**20)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return 350_500

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return 41


class TestNvml:
    def test_what_a_card_does_not_support_is_none(self) -> None:
        found = nvml_snapshot(FakeNvml(), "gpu 0")
        assert found == Snapshot(
            sm_clock_mhz=1980, memory_clock_mhz=3201, power_w=350.5, memory_used_mb=512, temperature_c=41
        )

    def test_it_is_asked_in_the_background(self) -> None:
        nvml = FakeNvml()
        with NvmlMonitor(nvml, "gpu 0", 0.001) as monitor:
            began = time.monotonic()
            while nvml.asked < 8 and time.monotonic() - began < 20:
                time.sleep(0.001)
        found = monitor.reading()
        assert found is not None
        assert found.samples >= 4
        assert found.power_w is not None and (found.power_w.least, found.power_w.most) == (350.5, 350.5)
        assert found.load_percent is None

    @pytest.mark.parametrize(
        ("visible", "handle"), [(None, "gpu 0"), ("", "gpu 0"), ("1,0", "gpu 1"), ("GPU-8f6d", "GPU-8f6d")]
    )
    def test_the_device_is_cudas_first(self, visible: str | None, handle: str) -> None:
        assert device_monitor._nvml_handle(FakeNvml(), visible) == handle

    def test_a_driver_that_refuses_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken="Driver Not Loaded"))
        monkeypatch.setattr(device_monitor, "is_installed", lambda name: True)
        monkeypatch.setattr(device_monitor.shutil, "which", lambda name: None)
        found = monitor_of_this_machine()
        assert isinstance(found, NoMonitor)
        assert "Driver Not Loaded" in found.reason

    def test_without_the_package_the_reason_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device_monitor, "is_installed", lambda name: False)
        monkeypatch.setattr(device_monitor.shutil, "which", lambda name: None)
        found = monitor_of_this_machine()
        assert isinstance(found, NoMonitor)
        assert "holov-export[bench]" in found.reason


def test_a_summary_spans_what_each_field_was_seen_with() -> None:
    seen = [Snapshot(power_w=100.0), Snapshot(power_w=300.0, load_percent=50.0), Snapshot(rails=(("VDD_SOC", 2.0),))]
    found = summary_of("nvml", seen)
    assert found is not None
    assert found.power_w is not None and (found.power_w.least, found.power_w.mean, found.power_w.most) == (
        100,
        200,
        300,
    )
    assert found.load_percent is not None and found.load_percent.mean == 50
    assert found.sm_clock_mhz is None
    assert [(rail.name, rail.watts.mean) for rail in found.rails] == [("VDD_SOC", 2.0)]
    assert summary_of("nvml", []) is None
