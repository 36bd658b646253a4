"""Device and pinned memory of a machine without a GPU: host memory that knows who may touch it.

Real CUDA answers an access past the end or after the free with a fault somewhere later, or not at all; here it is a
`Misuse` at once. Fresh memory holds garbage, as real memory does.
"""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field

import numpy as np

_ALIGNMENT = 512  # cudaMalloc promises at least 256 bytes. Source: CUDA C++ programming guide, device memory accesses
_GARBAGE, _FREED = 0xCD, 0xDD
_FILL_UP_TO = 64 << 20  # bytes; larger blocks stay untouched so that they cost no real memory


class Misuse(AssertionError):  # noqa: N818  it is the test that fails
    """Something that real CUDA or TensorRT leaves undefined: a crash or wrong numbers on a GPU."""


@dataclass(eq=False)
class Block:
    """One allocation.

    Attributes:
        kind: "device" or "pinned".
        flags: of cudaHostAlloc.
    """

    kind: str
    size: int
    flags: int = 0
    alive: bool = True
    address: int = 0
    buffer: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    def __post_init__(self) -> None:
        self.buffer = np.empty(self.size + _ALIGNMENT, np.uint8)
        start = -self.buffer.ctypes.data % _ALIGNMENT
        self.buffer = self.buffer[start : start + self.size]
        self.address = self.buffer.ctypes.data
        self.fill(_GARBAGE)

    def fill(self, byte: int) -> None:
        if self.size <= _FILL_UP_TO:
            self.buffer[:] = byte


class Memory:
    """Every block ever given out; a freed one is never given out again, so that a stale pointer is found."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.reserved = 0  # bytes that TensorRT took for itself
        self._addresses: list[int] = []
        self._blocks: dict[int, Block] = {}

    @property
    def free_bytes(self) -> int:
        return self.total - self.reserved - sum(item.size for item in self.alive() if item.kind == "device")

    def alive(self) -> list[Block]:
        return [block for block in self._blocks.values() if block.alive]

    def allocate(self, kind: str, size: int, flags: int = 0) -> Block:
        block = Block(kind, size, flags)
        bisect.insort(self._addresses, block.address)
        self._blocks[block.address] = block
        return block

    def release(self, address: int, kind: str) -> bool:
        """False: there is no such living block."""
        block = self._blocks.get(address)
        if block is None or not block.alive or block.kind != kind:
            return False
        block.alive = False
        block.fill(_FREED)
        return True

    def block_at(self, address: int, size: int, what: str) -> Block | None:
        """The living block that holds the bytes; None: pageable host memory, which nobody registers.

        Raises:
            Misuse: the bytes were freed, or reach past the end of their block.
        """
        place = bisect.bisect_right(self._addresses, address) - 1
        block = self._blocks[self._addresses[place]] if place >= 0 else None
        if block is None or address >= block.address + max(block.size, 1):
            return None
        if not block.alive:
            raise Misuse(f"{what} touches {block.kind} memory that was freed")
        if address + size > block.address + block.size:
            left = block.address + block.size - address
            raise Misuse(f"{what} touches {size} bytes where {left} are left of a {block.kind} block of {block.size}")
        return block

    def require(self, kind: str, address: int, size: int, what: str) -> None:
        """The bytes lie in a living block of that kind."""
        block = self.block_at(address, size, what)
        if block is None or block.kind != kind:
            found = "unregistered host" if block is None else block.kind
            raise Misuse(f"{what} needs {kind} memory, but 0x{address:x} is {found} memory")


def bytes_at(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def copy(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)
