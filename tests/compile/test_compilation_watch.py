"""A build that is watched: progress, silence, Ctrl-C, and what TensorRT says."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import tensorrt_standin
from tensorrt_standin import FakeGpu

from holov_export.compile import build_watch
from holov_export.compile.build_watch import BuildProgress, Messages, logger_for, monitor_for, watched


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_watch, "_FIRST_WORD", 0.01)
    monkeypatch.setattr(build_watch, "_LONGEST_SILENCE", 0.05)
    monkeypatch.setattr(build_watch, "_GRACE", 2.0)


def silent(message: str) -> None:
    pass


def test_the_result_comes_back() -> None:
    assert watched(lambda: 42, BuildProgress(), silent, can_cancel=True) == 42


def test_an_error_comes_back_as_it_was() -> None:
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        watched(fail, BuildProgress(), silent, can_cancel=True)


def test_a_long_build_says_that_it_goes_on() -> None:
    heard: list[str] = []
    enough = threading.Event()

    def tell(message: str) -> None:
        heard.append(message)
        if len(heard) == 3:
            enough.set()

    watched(lambda: enough.wait(10), BuildProgress(), tell, can_cancel=False)
    assert len(heard) >= 3
    assert all("so far" in message for message in heard)


def test_phases_are_told_outermost_first() -> None:
    progress = BuildProgress()
    progress.start("Building", 3)
    progress.step("Building", 0)
    progress.start("Timing", 40)
    assert progress.step("Timing", 9)
    assert progress.words() == "Building 1 of 3, Timing 10 of 40"
    progress.finish("Timing")
    assert progress.words() == "Building 1 of 3"
    assert progress.step("unknown", 5)


def interrupting(heard: list[str]) -> Callable[[str], None]:
    def tell(message: str) -> None:
        heard.append(message)
        raise KeyboardInterrupt

    return tell


def test_ctrl_c_cancels_a_build_that_can_be_cancelled() -> None:
    progress, ended = BuildProgress(), threading.Event()

    def build() -> None:
        while progress.step("Building", 0):
            time.sleep(0.005)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        watched(build, progress, interrupting([]), can_cancel=True)
    assert ended.is_set()


def test_ctrl_c_leaves_a_build_that_cannot_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []
    monkeypatch.setattr(build_watch.atexit, "register", lambda *arguments: left.append(arguments))
    enough = threading.Event()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        watched(lambda: enough.wait(30), BuildProgress(), interrupting([]), can_cancel=False)
    assert time.monotonic() - start < 10
    assert len(left) == 1
    enough.set()


_LEFT = """
import threading
from holov_export.compile import build_watch
build_watch._FIRST_WORD = 0.01
def tell(message):
    raise KeyboardInterrupt
try:
    build_watch.watched(threading.Event().wait, build_watch.BuildProgress(), tell, can_cancel=False)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_build_that_is_left_does_not_keep_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", _LEFT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "interrupted\n", "")


@pytest.mark.parametrize("version", tensorrt_standin.VERSIONS)
def test_the_logger_keeps_what_matters_and_never_raises(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = Messages()
    with tensorrt_standin.installed(version, gpu=FakeGpu()) as trt:
        logger, severity = logger_for(trt, messages), trt.ILogger.Severity
        for level in ("VERBOSE", "INFO", "WARNING", "WARNING", "ERROR", "INTERNAL_ERROR"):
            logger.log(getattr(severity, level), f"a {level.lower()}")
        monkeypatch.setattr(messages, "take", None)
        logger.log(severity.ERROR, "lost")
    assert messages.warnings == ["a warning"]
    assert messages.errors == ["a error", "a internal_error"]


@pytest.mark.parametrize("version", [item for item in tensorrt_standin.VERSIONS if item != "8.6.0"])
def test_the_monitor_reports_and_stops_and_never_raises(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = BuildProgress()
    with tensorrt_standin.installed(version, gpu=FakeGpu()) as trt:
        monitor = monitor_for(trt, progress)
        monitor.phase_start("Building", None, 4)
        assert monitor.step_complete("Building", 0) is True
        assert progress.words() == "Building 1 of 4"
        progress.cancel()
        assert monitor.step_complete("Building", 1) is False
        monitor.phase_finish("Building")
        monkeypatch.setattr(progress, "step", None)
        assert monitor.step_complete("Building", 2) is True


def test_many_warnings_are_counted() -> None:
    messages, heard = Messages(), list[str]()
    for index in range(25):
        messages.take("WARNING", f"warning {index}")
    messages.tell_warnings(heard.append)
    assert len(heard) == 11
    assert "15 more" in heard[-1]
    assert messages.warnings == []
