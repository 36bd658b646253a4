"""ILogger, which users subclass, and Logger, which prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tensorrt_standin.facade import Interface

if TYPE_CHECKING:
    from tensorrt_standin.world import World


class ILogger(Interface):
    """What users subclass to get the messages."""

    def log(self, severity: Any, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    """Prints what is severe enough."""

    writable: ClassVar[dict[str, str]] = {"min_severity": "ILogger.Severity"}

    def __init__(self, world: World, min_severity: Any = None) -> None:
        super().__init__(world)
        self.min_severity = world.enum("Severity", "WARNING") if min_severity is None else min_severity

    def log(self, severity: Any, msg: str) -> None:
        if severity <= self.min_severity:
            print(f"[TRT] [{severity.name[0]}] {msg}")
