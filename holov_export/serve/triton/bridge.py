"""Arrays to and from the tensors of Triton's Python backend, by the way that is right with the numpy that is installed.

The backend's stub is a program of Triton's, compiled against one generation of numpy. Those of Triton 2.51, for Python
3.10, 3.11 and 3.12, read arrays of numpy 2 wrongly and say nothing: shapes are right, values are not; a string ends the
stub. DLPack is right with both, and has no strings. So the stub at hand is tried before the first request.
"""

from __future__ import annotations

import importlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from holov_export.errors import EnvironmentFaultError, HolovExportError, UsageError

#: request, response and tensor of the backend have no types outside of Triton
Request = Any
Tensor = Any


class Bridge:
    """The module `triton_python_backend_utils`, with typed doors.

    Attributes:
        backend: the module.
        plain: numpy arrays pass directly; else by DLPack, and there are no strings.
    """

    def __init__(self, backend: Any = None, *, strings: bool = True) -> None:
        """Look at how arrays pass.

        Args:
            backend: None for the module that the stub brings.
            strings: the model takes or gives strings.

        Raises:
            EnvironmentFaultError: strings do not pass with this numpy, or nothing does.
        """
        self.backend = importlib.import_module("triton_python_backend_utils") if backend is None else backend
        self.plain = self._passes_plainly()
        if not self.plain and not self._passes(np.from_dlpack):
            raise EnvironmentFaultError(f"arrays do not pass between numpy {np.__version__} and this Triton's stub.")
        if strings and not self.plain:
            raise EnvironmentFaultError(
                f"this Triton's Python stub was made for numpy 1 and reads strings of numpy {np.__version__} wrongly.",
                hint='Install "numpy<2" in the environment of the models, or use a newer Triton.',
            )

    def _passes_plainly(self) -> bool:
        """Whether the stub makes the right numpy array of memory that is not its own."""
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            return True  # and DLPack from numpy 1 must not even be tried: the stub recurses until its stack is full
        return self._passes(lambda tensor: tensor.as_numpy())

    def _passes(self, read: Callable[[Tensor], npt.NDArray[Any]]) -> bool:
        for sent in (np.arange(15, dtype=np.float32).reshape(3, 5) + 0.25, np.array([[3, -4], [5, 6]], dtype=np.int64)):
            got = read(self.backend.Tensor.from_dlpack("check", sent))
            if got.dtype != sent.dtype or not np.array_equal(got, sent):
                return False
        return True

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        """The values of a tensor in an array of their own."""
        found = tensor.as_numpy() if self.plain else np.from_dlpack(tensor)
        return np.array(found)

    def input(self, request: Request, name: str) -> npt.NDArray[Any] | None:
        """An input of a request; None where it was left out."""
        tensor = self.backend.get_input_tensor_by_name(request, name)
        return None if tensor is None else self.array(tensor)

    def needed(self, request: Request, name: str) -> npt.NDArray[Any]:
        """An input that must be there.

        Raises:
            UsageError: it is not.
        """
        found = self.input(request, name)
        if found is None:
            raise UsageError(f"the request has no input '{name}'.")
        return found

    def output(self, response: Any, name: str) -> npt.NDArray[Any]:
        """An output of another model's response."""
        return self.array(self.backend.get_output_tensor_by_name(response, name))

    def tensor(self, name: str, array: npt.NDArray[Any]) -> Tensor:
        """A tensor of these values."""
        if self.plain or array.size == 0:  # DLPack refuses what is empty
            return self.backend.Tensor(name, np.ascontiguousarray(array))
        return self.backend.Tensor.from_dlpack(name, np.array(array, order="C"))  # nor does it take read-only memory

    def texts(self, name: str, texts: Sequence[str]) -> Tensor:
        """A tensor of strings [len(texts)]."""
        return self.tensor(name, np.array([text.encode() for text in texts], dtype=np.object_))

    def response(self, tensors: Sequence[Tensor]) -> Any:
        return self.backend.InferenceResponse(output_tensors=list(tensors))

    def send(self, sender: Any, response: Any, wanted: Collection[str], *, last: bool = False) -> None:
        """Send a response of a decoupled model, with those outputs that the request wants.

        The stub of Triton 2.51 drops the others itself, without holding Python's lock; on Python 3.12 this ends the
        process.
        """
        if not response.has_error():
            response = self.response([tensor for tensor in response.output_tensors() if tensor.name() in wanted])
        flags = self.backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        sender.send(response, flags=flags)

    def failure(self, error: Exception) -> Any:
        """The response that tells a client what went wrong."""
        return self.backend.InferenceResponse(output_tensors=[], error=self.error(error))

    def error(self, error: Exception) -> Any:
        """Triton's error for ours; what is no error of ours is a fault of this code, and the log gets the traceback."""
        kinds = self.backend.TritonError
        if isinstance(error, UsageError):
            return kinds(str(error), kinds.INVALID_ARG)
        if isinstance(error, HolovExportError):
            return kinds(str(error), kinds.UNAVAILABLE)
        self.backend.Logger.log_error("".join(traceback.format_exception(error)))
        return kinds(f"internal error: {type(error).__name__}: {error}", kinds.INTERNAL)


#: seconds; the stub lets go within milliseconds
_KEPT_FOR = 30.0
_kept: deque[tuple[float, Any]] = deque()
_guard = threading.Lock()


def responses_of(call: Any) -> Iterator[Any]:
    """The responses of a request to a decoupled model.

    Their iterator is kept for a while after its end. The stub of Triton 2.51 drops its own reference in a thread that
    does not hold Python's lock; were that the last one, it would free Python's objects there. On Python 3.12 this ends
    the process each time, on older ones it is a race.
    """
    responses = call.exec(decoupled=True)
    try:
        yield from responses
    finally:
        now = time.monotonic()
        with _guard:
            _kept.append((now, responses))
            while now - _kept[0][0] > _KEPT_FOR:
                _kept.popleft()


def texts_of(array: npt.NDArray[Any]) -> list[str]:
    """The strings of a tensor.

    Raises:
        UsageError: they are no UTF-8.
    """
    try:
        return [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise UsageError(f"a text is no UTF-8: {error}.") from error
