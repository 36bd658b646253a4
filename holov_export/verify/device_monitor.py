"""Clocks, power and memory of a GPU while something runs: NVML on PCs and servers, tegrastats on a Jetson.

Both are optional. What a device does not report stays None; where neither is there, a `NoMonitor` says why.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

from holov_export.extras import is_installed, require
from holov_export.policies import Frozen

if TYPE_CHECKING:
    from typing_extensions import Self

#: seconds between two looks. Source: tegrastats takes milliseconds; NVML averages power over up to a second
INTERVAL = 0.05


class Span(Frozen):
    """Smallest, mean and largest of what was seen."""

    least: float
    mean: float
    most: float


class Rail(Frozen):
    """Power of one supply rail of a Jetson, W. Rails are not summed: boards differ in what each one feeds."""

    name: str
    watts: Span


class DeviceReading(Frozen):
    """What a device reported while something ran; None for what it does not report.

    Attributes:
        source: who was asked. samples: how often it answered.
        sm_clock_mhz, memory_clock_mhz: of the GPU and its memory.
        power_w: of the board (NVML), or of the module where it has a rail for that (VDD_IN).
        rails: the rails of a Jetson.
        memory_used_mb: MiB in use on the device, by whomever; on a Jetson, of the memory that CPU and GPU share.
        load_percent: share of the time in which the GPU was busy. temperature_c: of the GPU.
    """

    source: Literal["nvml", "tegrastats"]
    samples: int
    sm_clock_mhz: Span | None = None
    memory_clock_mhz: Span | None = None
    power_w: Span | None = None
    rails: tuple[Rail, ...] = ()
    memory_used_mb: Span | None = None
    load_percent: Span | None = None
    temperature_c: Span | None = None


@dataclass(frozen=True)
class Snapshot:
    """One answer of a device; see `DeviceReading`. `rails` are (name, watts)."""

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    rails: tuple[tuple[str, float], ...] = ()
    memory_used_mb: float | None = None
    load_percent: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class NoMonitor:
    """Why nothing can be read here."""

    reason: str


class Monitor(Protocol):
    """Reads a device in the background between `with` and its end."""

    def reading(self) -> DeviceReading | None:
        """What was seen since it was entered; None if the device never answered."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def monitor_of_this_machine(interval: float = INTERVAL) -> Callable[[], Monitor] | NoMonitor:
    """What makes a monitor for each measurement, or why there is none."""
    found = shutil.which("tegrastats")
    if found is not None:
        return lambda: TegrastatsMonitor(found, interval)
    if not is_installed("pynvml"):
        return NoMonitor('the package nvidia-ml-py is not installed (pip install "holov-export[bench]")')
    nvml = require("pynvml")
    try:
        nvml.nvmlInit()
        handle = _nvml_handle(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except nvml.NVMLError as error:
        return NoMonitor(f"NVML refuses: {error}")
    return lambda: NvmlMonitor(nvml, handle, interval)


def summary_of(source: Literal["nvml", "tegrastats"], seen: Sequence[Snapshot]) -> DeviceReading | None:
    """Least, mean and most of each field over the snapshots that have it."""
    if not seen:
        return None
    names = list(dict.fromkeys(name for item in seen for name, _ in item.rails))
    rails = []
    for name in names:
        span = _span(watts for item in seen for rail, watts in item.rails if rail == name)
        assert span is not None
        rails.append(Rail(name=name, watts=span))
    return DeviceReading(
        source=source,
        samples=len(seen),
        sm_clock_mhz=_span(item.sm_clock_mhz for item in seen),
        memory_clock_mhz=_span(item.memory_clock_mhz for item in seen),
        power_w=_span(item.power_w for item in seen),
        rails=tuple(rails),
        memory_used_mb=_span(item.memory_used_mb for item in seen),
        load_percent=_span(item.load_percent for item in seen),
        temperature_c=_span(item.temperature_c for item in seen),
    )


def _span(values: Iterable[float | None]) -> Span | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Span(least=round(min(known), 3), mean=round(sum(known) / len(known), 3), most=round(max(known), 3))


# ---------------------------------------------------------------------------------------------------- NVML


def _nvml_handle(nvml: Any, visible: str | None) -> Any:
    """The device that CUDA calls its first. NVML counts in PCI order and ignores CUDA_VISIBLE_DEVICES."""
    first = (visible or "0").split(",")[0].strip()
    if first.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    return nvml.nvmlDeviceGetHandleByUUID(first)


def nvml_snapshot(nvml: Any, handle: Any) -> Snapshot:
    """Ask once. What this device or driver does not support is None."""

    def asked(question: Callable[[], float]) -> float | None:
        try:
            return question()
        except nvml.NVMLError:
            return None

    return Snapshot(
        sm_clock_mhz=asked(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
        memory_clock_mhz=asked(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))),
        power_w=asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),  # milliwatts
        memory_used_mb=asked(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20),
        load_percent=asked(lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        temperature_c=asked(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
    )


@dataclass
class NvmlMonitor:
    """Asks NVML every `interval` seconds in a thread."""

    nvml: Any
    handle: Any
    interval: float = INTERVAL
    seen: list[Snapshot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while True:
            self.seen.append(nvml_snapshot(self.nvml, self.handle))
            if self._end.wait(self.interval):
                return

    def reading(self) -> DeviceReading | None:
        """See `Monitor`."""
        return summary_of("nvml", self.seen)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


# ---------------------------------------------------------------------------------------------------- tegrastats

_RAM = re.compile(r"\bRAM (\d+)/\d+MB")
#: "GR3D_FREQ 99%@1300", "99%@[1300,1298]" (JetPack 5 and 6), "99%", and "@[1000,1000]" without a load (Thor)
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?([\d,]+)\]?)?")
_MEMORY_CLOCK = re.compile(r"\bEMC_FREQ \d+%@(\d+)")
_TEMPERATURE = re.compile(r"\bgpu@(-?[\d.]+)C", re.IGNORECASE)
#: "VDD_IN 4984mW/4984mW": now/average, newer ones with a third value; before JetPack 4.6 without the unit
_RAIL = re.compile(r"\b((?:VDD|VIN|POM|VDDQ|VDDRQ)[A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?")
#: the rail that feeds the whole module, on those that have it.
#: Source: https://forums.developer.nvidia.com/t/interpretation-of-jetson-nx-power-rail/200883
_WHOLE_MODULE = "VDD_IN"


def snapshot_of_line(line: str) -> Snapshot | None:
    """One line of tegrastats; None if it is none.

    Source: Jetson Linux developer guide, "tegrastats Utility", of releases 32 to 36.
    """
    memory = _RAM.search(line)
    if memory is None:
        return None
    gpu, memory_clock, temperature = _GPU.search(line), _MEMORY_CLOCK.search(line), _TEMPERATURE.search(line)
    clocks = [float(item) for item in gpu[2].split(",") if item] if gpu and gpu[2] else []
    rails = tuple((name, int(milliwatts) / 1e3) for name, milliwatts in _RAIL.findall(line))
    # -256 stands for a sensor of a part that is switched off
    degrees = float(temperature[1]) if temperature else -256.0
    return Snapshot(
        sm_clock_mhz=max(clocks) if clocks else None,
        memory_clock_mhz=float(memory_clock[1]) if memory_clock else None,
        power_w=next((watts for name, watts in rails if name == _WHOLE_MODULE), None),
        rails=rails,
        memory_used_mb=float(memory[1]),
        load_percent=float(gpu[1]) if gpu and gpu[1] else None,
        temperature_c=degrees if degrees > -256 else None,
    )


@dataclass
class TegrastatsMonitor:
    """Runs tegrastats and reads its lines in a thread."""

    program: str
    interval: float = INTERVAL
    seen: list[Snapshot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def _watch(self, lines: IO[str]) -> None:
        with contextlib.suppress(ValueError):  # the pipe is closed while it is read
            for line in lines:
                found = snapshot_of_line(line)
                if found is not None:
                    self.seen.append(found)

    def reading(self) -> DeviceReading | None:
        """See `Monitor`."""
        return summary_of("tegrastats", self.seen)

    def __enter__(self) -> Self:
        line = [self.program, "--interval", str(max(1, round(self.interval * 1e3)))]
        try:
            self._process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:  # not executable for this user: nothing is read, and `reading` says so
            return self
        assert self._process.stdout is not None
        self._thread = threading.Thread(target=self._watch, args=(self._process.stdout,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._thread is not None:
            self._thread.join(2)
        if self._process.stdout is not None:
            self._process.stdout.close()
