"""TensorRT's plain values: Dims and the host memory that holds a plan."""

from __future__ import annotations

from typing import Any

#: Class -> its number of dimensions; None: any up to 8
DIMS_SIZES: dict[str, int | None] = {"Dims": None, "Dims2": 2, "DimsHW": 2, "Dims3": 3, "Dims4": 4}
_MAX_DIMS = 8


class Dims:
    """Dimensions. Equal to tuples and lists, indexable, printed as a tuple. Source: pyFoundationalTypes.cpp"""

    __slots__ = ("_sizes",)
    MAX_DIMS = _MAX_DIMS
    _length: int | None = None

    def __init__(self, *shape: Any) -> None:
        """From nothing, from one sequence, or (where the class has a length) from that many numbers."""
        name = type(self).__name__
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        many = len(shape) > 1 and len(shape) != self._length
        if many or not all(hasattr(item, "__index__") for item in sizes):
            text = "__init__(): incompatible constructor arguments. The following argument types are supported:"
            raise TypeError(f"{text}\n    1. tensorrt.tensorrt.{name}(shape: List[int])\n\nInvoked with: {shape}")
        if len(sizes) > _MAX_DIMS:
            raise ValueError(f"Input length {len(sizes)}. Max expected length is {_MAX_DIMS}")
        if self._length is not None and len(sizes) not in (0, self._length):
            raise ValueError(f"Input length {len(sizes)} not equal to expected {name} length, which is {self._length}")
        self._sizes = tuple(int(item) for item in sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, place: Any) -> Any:
        return self._sizes[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Dims, tuple, list)) and tuple(other) == self._sizes

    __hash__ = None

    def __repr__(self) -> str:
        return str(self._sizes)

    __str__ = __repr__


def dims_class(name: str, base: type | None) -> type:
    space: dict[str, Any] = {"__slots__": (), "__module__": "tensorrt.tensorrt", "_length": DIMS_SIZES[name]}
    if name == "DimsHW":
        space |= {"h": property(lambda dims: dims[0]), "w": property(lambda dims: dims[1])}
    return type(name, (base or Dims,), space)


class HostMemory(bytes):
    """IHostMemory: a read-only buffer and no more.

    It is a `bytes` because Python before 3.12 lets no other pure-Python object export a buffer; what `bytes` has
    beyond the buffer is refused.
    """

    @property
    def nbytes(self) -> int:
        return bytes.__len__(self)

    @property
    def dtype(self) -> Any:
        raise NotImplementedError("the stand-in knows IHostMemory.dtype but does not act it")

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"'tensorrt.tensorrt.IHostMemory' object has no attribute '{name}'")

    def __repr__(self) -> str:
        return object.__repr__(self)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _refuse(name: str) -> Any:
    def refuse(self: HostMemory, *args: Any) -> Any:
        raise TypeError(f"'tensorrt.tensorrt.IHostMemory' object has no {name}")

    return refuse


def _lacks(name: str) -> Any:
    def lacks(self: HostMemory) -> Any:
        raise AttributeError(f"'tensorrt.tensorrt.IHostMemory' object has no attribute '{name}'")

    return lacks


for _name in ("__len__", "__getitem__", "__iter__", "__add__", "__contains__", "__mod__", "__mul__"):
    setattr(HostMemory, _name, _refuse(_name))
for _name in [item for item in dir(bytes) if not item.startswith("_")]:
    setattr(HostMemory, _name, property(_lacks(_name)))
HostMemory.__name__ = HostMemory.__qualname__ = "IHostMemory"
HostMemory.__module__ = "tensorrt.tensorrt"
