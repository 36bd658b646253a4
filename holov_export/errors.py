"""Every exception that holov-export raises on purpose.

    HolovExportError
    ├── UsageError (exit code 2): the request or its input is wrong
    │   ├── UnknownNameError        a model, method, target or decoder that does not exist
    │   ├── UnsupportedModelError   a checkpoint of a family or layout that cannot be exported
    │   ├── CheckpointError         a checkpoint is missing, truncated or pickled
    │   ├── ImageError              an image cannot be read or is refused
    │   │   └── VideoError          so with a clip, or with one of its frames
    │   ├── BudgetError             a token budget or quota outside its range
    │   ├── PromptError             placeholders and images differ, an empty prompt, a prompt past the context
    │   ├── BundleError             a folder is no bundle, or of another schema, or lacks a part
    │   └── EngineError             an engine is for another GPU, TensorRT, graph or shape
    ├── CheckFailedError (exit code 1): something ran and the result is not good enough
    │   ├── IntegrityError          a file differs from the hash in the manifest
    │   ├── ParityError             two back ends disagree by more than the tolerance
    │   └── LossError               a quantised graph lost more than its recipe allows
    └── EnvironmentFaultError (exit code 3): this machine lacks something
        ├── MissingExtraError       a Python package; the message names the pip line
        ├── HardwareError           no usable GPU or driver
        ├── NetworkError            the model hub or a server cannot be reached
        ├── StorageError            a folder is read-only, the disk is full, another export holds the lock
        ├── BusyError               a server's queue is full, or it is shutting down
        └── LateError               a request waited or ran longer than a server's limits allow

A message says what happened and why; `hint` says what to do.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "BundleError",
    "BusyError",
    "CheckFailedError",
    "CheckpointError",
    "EngineError",
    "EnvironmentFaultError",
    "HardwareError",
    "HolovExportError",
    "ImageError",
    "IntegrityError",
    "LateError",
    "LossError",
    "MissingExtraError",
    "NetworkError",
    "ParityError",
    "PromptError",
    "StorageError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UsageError",
    "VideoError",
]


class HolovExportError(Exception):
    """Base class. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class UsageError(HolovExportError):
    """The request or its input is wrong."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A model, method, target or decoder that does not exist."""


class UnsupportedModelError(UsageError):
    """A checkpoint of a family or layout that cannot be exported."""


class CheckpointError(UsageError):
    """A checkpoint is missing, truncated or pickled."""


class ImageError(UsageError):
    """An image cannot be read or is refused."""


class VideoError(ImageError):
    """A clip or one of its frames cannot be read or is refused."""


class BudgetError(UsageError):
    """A token budget or quota outside its range."""


class PromptError(UsageError):
    """Placeholders and images differ, the prompt is empty, or it is longer than the context."""


class BundleError(UsageError):
    """A folder is no bundle, or of another schema, or lacks a part."""


class EngineError(UsageError):
    """An engine is for another GPU, TensorRT, graph or shape."""


class CheckFailedError(HolovExportError):
    """Something ran and the result is not good enough."""

    exit_code = 1


class IntegrityError(CheckFailedError):
    """A file differs from the hash in the manifest."""


class ParityError(CheckFailedError):
    """Two back ends disagree by more than the tolerance."""


class LossError(CheckFailedError):
    """A quantised graph lost more than its recipe allows."""


class EnvironmentFaultError(HolovExportError):
    """This machine lacks something."""

    exit_code = 3


class MissingExtraError(EnvironmentFaultError):
    """A Python package is not installed; the message names the pip line."""


class HardwareError(EnvironmentFaultError):
    """No usable GPU or driver."""


class NetworkError(EnvironmentFaultError):
    """The model hub or a server cannot be reached."""


class StorageError(EnvironmentFaultError):
    """A folder is read-only, the disk is full, or another export holds the lock."""


class BusyError(EnvironmentFaultError):
    """A server's queue is full, or it is shutting down.

    Attributes:
        retry_after: seconds after which another try makes sense.
    """

    def __init__(self, message: str, *, retry_after: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class LateError(EnvironmentFaultError):
    """A request waited or ran longer than a server's limits allow."""
