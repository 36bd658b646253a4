"""A build of minutes, watched: what TensorRT says, how far it is, and a way out by Ctrl-C.

The build runs in a thread of its own. TensorRT holds the calling thread until it is done, and a Ctrl-C is only taken by
a main thread that runs Python; so the main thread waits here, tells of the progress and takes it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

Tell = Callable[[str], None]
T = TypeVar("T")

#: seconds between two words about the progress: they begin so and double
_FIRST_WORD, _LONGEST_SILENCE = 10.0, 60.0
#: seconds that a cancelled build gets to end by itself
_GRACE = 60.0
#: different warnings that are repeated to the user; TensorRT can write thousands
_SHOWN = 10
_INTERRUPTED = 130


@dataclass
class Messages:
    """What TensorRT logged: each text once, in order."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def take(self, severity: str, text: str) -> None:
        """Keep a message of this severity ("WARNING", "ERROR", "INTERNAL_ERROR"); others are dropped."""
        found = {"WARNING": self.warnings, "ERROR": self.errors, "INTERNAL_ERROR": self.errors}.get(severity)
        if found is not None and text.strip() not in found:
            found.append(text.strip())

    def tell_warnings(self, tell: Tell) -> None:
        """Repeat the warnings and forget them."""
        for text in self.warnings[:_SHOWN]:
            tell(f"TensorRT warns: {text}")
        if len(self.warnings) > _SHOWN:
            tell(f"TensorRT warns: {len(self.warnings) - _SHOWN} more warnings")
        self.warnings.clear()

    def reason(self) -> str:
        """The errors as one sentence part."""
        return "; ".join(self.errors) or "it does not say why"


def logger_for(trt: Any, messages: Messages) -> Any:
    """A TensorRT logger that fills `messages`. An exception inside it would end the process, so there is none."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            with suppress(BaseException):
                messages.take(severity.name, msg)

    return Logger()


class BuildProgress:
    """How far a build is, as TensorRT tells a progress monitor, from whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[int, int]] = {}
        self._cancelled = False

    def start(self, phase: str, steps: int) -> None:
        with self._lock:
            self._phases[phase] = (0, steps)

    def step(self, phase: str, step: int) -> bool:
        """Note a finished step (counted from 0); False asks TensorRT to stop."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase] = (step + 1, self._phases[phase][1])
            return not self._cancelled

    def finish(self, phase: str) -> None:
        with self._lock:
            self._phases.pop(phase, None)

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True

    def words(self) -> str:
        """The running phases, outer ones first: "Building Engine 3 of 12, Timing kernels 40 of 120"."""
        with self._lock:
            return ", ".join(f"{name} {done} of {steps}" for name, (done, steps) in self._phases.items())


def monitor_for(trt: Any, progress: BuildProgress) -> Any:
    """A progress monitor (TensorRT 10 and later) that fills `progress`. It cannot raise: TensorRT would stop."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with suppress(BaseException):
                progress.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with suppress(BaseException):
                progress.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                return progress.step(phase_name, step)
            except BaseException:
                return True

    return Monitor()


def watched(work: Callable[[], T], progress: BuildProgress, tell: Tell, *, can_cancel: bool) -> T:
    """Run `work` in a thread and tell how it goes on.

    Args:
        can_cancel: TensorRT asks `progress` whether to go on (10 and later).

    Raises:
        KeyboardInterrupt: Ctrl-C. A build that cannot be cancelled is left alone and ends with the process.
    """
    done = threading.Event()
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
    start = time.monotonic()
    thread.start()
    try:
        pause = _FIRST_WORD
        while not done.wait(pause):
            phases = progress.words()
            tell(f"build the engine: {_duration(time.monotonic() - start)} so far{', ' + phases if phases else ''}")
            pause = min(2 * pause, _LONGEST_SILENCE)
    except BaseException:
        progress.cancel()
        try:
            if can_cancel:
                with suppress(BaseException):
                    tell("cancel the build")
                done.wait(_GRACE)  # a second Ctrl-C ends the waiting
        finally:
            if not done.is_set():
                atexit.register(_leave_without, thread)
        raise
    if failures:
        raise failures[0]
    return results[0]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _leave_without(thread: threading.Thread) -> None:
    """End the process at once if a build still runs: its logger would call into an interpreter that is gone."""
    if thread.is_alive():
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_INTERRUPTED)
