"""DLPack and the CUDA array interface, as real consumers read them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from holov_export.runtime import device_array
from holov_export.runtime.device_array import DL_CPU, DeviceArray, capsule, device_view


@dataclass
class Owner:
    """Remembers what it was asked."""

    asked: list[Any] = field(default_factory=list)

    def wait(self) -> None:
        self.asked.append("wait")

    def order_before(self, stream: int) -> None:
        self.asked.append(stream)

    def read_by_unknown(self) -> None:
        self.asked.append("unknown")


class OnTheHost:
    """The capsule that a DeviceArray would give, over host memory, so that a CPU's torch and numpy can take it."""

    def __init__(self, values: np.ndarray[Any, Any], *, bfloat16: bool = False) -> None:
        self.values = values
        self._code = device_array._DL_BFLOAT if bfloat16 else device_array._DL_CODES[values.dtype.kind]

    def __dlpack_device__(self) -> tuple[int, int]:
        return DL_CPU, 0

    def __dlpack__(self, **asked: Any) -> Any:
        bits = self.values.dtype.itemsize * 8
        return capsule(self.values.ctypes.data, self.values.shape, self._code, bits, DL_CPU, keep=self)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.int32])
@pytest.mark.parametrize("consumer", [torch.from_dlpack, np.from_dlpack])
def test_a_consumer_sees_the_memory_itself_and_keeps_it(consumer: Any, dtype: Any) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    made = OnTheHost(values)
    alive = weakref.ref(made)
    seen = consumer(made)
    del made
    gc.collect()
    np.testing.assert_array_equal(np.asarray(seen), values)
    assert np.asarray(seen).dtype == dtype
    values[1, 2, 3] = 99
    assert seen[1, 2, 3] == 99
    part = seen[1]
    del seen
    gc.collect()
    assert part[2, 3] == 99
    assert alive() is not None
    del part
    gc.collect()
    assert alive() is None


def test_bfloat16_arrives_as_such() -> None:
    seen = torch.from_dlpack(OnTheHost(np.array([0x3F80, 0xC000], np.uint16), bfloat16=True))
    assert seen.dtype == torch.bfloat16
    assert seen.tolist() == [1.0, -2.0]


def test_a_capsule_that_nobody_takes_is_let_go() -> None:
    made = OnTheHost(np.zeros(3, np.float32))
    alive, taken = weakref.ref(made), made.__dlpack__()
    del made
    gc.collect()
    assert alive() is not None
    del taken
    assert alive() is None


def test_letting_go_while_an_exception_is_on_its_way() -> None:
    """A temporary dies while ZeroDivisionError unwinds the stack; a deleter in Python would lose the exception."""
    made = OnTheHost(np.zeros(3, np.float32))
    alive = weakref.ref(made)
    for consumer in (torch.from_dlpack, np.from_dlpack, lambda tensor: tensor.__dlpack__()):
        with pytest.raises(ZeroDivisionError):
            max(consumer(made), 1 // 0)
    del made
    gc.collect()
    assert alive() is None


def array(owner: Owner, *, bfloat16: bool = False) -> DeviceArray:
    return DeviceArray((2, 3), np.dtype("uint16" if bfloat16 else "float16"), 4096, owner, bfloat16)


@pytest.mark.parametrize(("stream", "asked"), [(None, [1]), (1, [1]), (2, [2]), (4711, [4711]), (-1, [])])
def test_the_consumers_stream_waits(stream: int | None, asked: list[int]) -> None:
    owner = Owner()
    array(owner).__dlpack__(stream=stream, max_version=(1, 0), dl_device=(2, 0), copy=False)
    assert owner.asked == [*asked, "unknown"]


def test_what_dlpack_cannot_give() -> None:
    owner = Owner()
    with pytest.raises(BufferError, match="without a copy"):
        array(owner).__dlpack__(copy=True)
    with pytest.raises(BufferError, match="on the GPU"):
        array(owner).__dlpack__(dl_device=(1, 0))
    with pytest.raises(ValueError, match="ambiguous"):
        array(owner).__dlpack__(stream=0)
    with pytest.raises((BufferError, RuntimeError), match="nsupported device"):
        np.from_dlpack(array(owner))  # numpy has no GPU
    assert array(owner).__dlpack_device__() == (2, 0)


def test_the_cuda_array_interface() -> None:
    owner = Owner()
    said = array(owner).__cuda_array_interface__
    assert owner.asked == ["wait", "unknown"]
    assert said == {
        "shape": (2, 3), "typestr": "<f2", "data": (4096, False), "strides": None, "version": 3, "stream": None
    }  # fmt: skip
    view = device_view(array(owner))
    assert (view.pointer, view.shape, view.dtype) == (4096, (2, 3), np.float16)
    assert (view.writer, view.ready) == (None, True)
    assert array(owner).nbytes == 12


def test_bfloat16_has_no_cuda_array_interface() -> None:
    assert not hasattr(array(Owner(), bfloat16=True), "__cuda_array_interface__")
    assert array(Owner(), bfloat16=True).__dlpack__() is not None


@pytest.mark.parametrize(
    ("said", "writer", "ready"),
    [
        ({"version": 2}, None, False),
        ({"version": 3}, None, True),
        ({"version": 3, "stream": None}, None, True),
        ({"version": 3, "stream": 1}, 1, False),
        ({"version": 3, "stream": 77, "strides": (12, 4)}, 77, False),
    ],
)
def test_who_writes_an_array(said: dict[str, Any], writer: int | None, ready: bool) -> None:
    foreign = SimpleNamespace(
        __cuda_array_interface__={"shape": (2, 3), "typestr": "<f4", "data": (4096, True), **said}
    )
    view = device_view(foreign)  # type: ignore[arg-type]
    assert (view.writer, view.ready) == (writer, ready)
