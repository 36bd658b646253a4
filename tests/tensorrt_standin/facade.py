"""Python classes with exactly the names and signatures of one TensorRT version, in front of behaviour that has more.

A `Core` acts; its facade is what the code under test holds. A facade refuses names that the version lacks, new
attributes, and calls that no signature fits, with the words of pybind11. Cores never see facades of other cores and
the code under test never sees a core.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tensorrt_standin.api import Signature
from tensorrt_standin.enums import EnumMember

if TYPE_CHECKING:
    from tensorrt_standin.world import World


class Core:
    """Behaviour of one TensorRT object.

    Attributes:
        interface: True for classes that users subclass; other cores are handed the user's object, not the core.
        writable: plain attributes that may be set from outside: name -> type as the signatures write it.
    """

    interface = False
    writable: ClassVar[dict[str, str]] = {}

    def __init__(self, world: World) -> None:
        self.world = world
        self._facade: weakref.ref[Any] | None = None

    def facade(self) -> Any:
        """The object that stands for this core outside; a new one when the old one was dropped."""
        facade = self._facade() if self._facade else None
        if facade is None:
            cls = self.world.classes[type(self).__name__]
            facade = cls.__new__(cls)
            attach(facade, self)
        return facade


class Interface(Core):
    """A class that users subclass: IProgressMonitor, IOutputAllocator and their like."""

    interface = True


def attach(facade: Any, core: Core) -> None:
    object.__setattr__(facade, "_core", core)
    core._facade = weakref.ref(facade)


def outside(value: Any) -> Any:
    """A result as the caller sees it: cores become facades."""
    if isinstance(value, Core):
        return value.facade()
    if type(value) in (list, tuple):
        return type(value)(outside(item) for item in value)
    return value


def inside(value: Any) -> Any:
    """An argument as a core sees it: facades become cores, except those of interfaces."""
    if isinstance(value, Facade):
        core = value._core
        return value if core.interface else core
    if type(value) in (list, tuple):
        return type(value)(inside(item) for item in value)
    return value


class _FacadeType(type):
    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"type object 'tensorrt.tensorrt.{cls.__name__}' has no attribute '{name}'")


class Facade(metaclass=_FacadeType):
    """The base of every generated class."""

    __slots__ = ("__weakref__", "_core")

    def __getattr__(self, name: str) -> Any:
        if name == "_core":
            bound = next(cls for cls in type(self).__mro__ if cls.__module__ == "tensorrt.tensorrt")
            raise TypeError(f"tensorrt.tensorrt.{bound.__name__}.__init__() must be called when overriding __init__")
        raise AttributeError(f"'tensorrt.tensorrt.{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name) and not hasattr(self, "__dict__"):
            raise AttributeError(f"'tensorrt.tensorrt.{type(self).__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)


def facade_from_core(name: str, core: type[Core] | None, bases: tuple[type, ...], world: World) -> type:
    """The class `name` of the world's version, acting through `core` (None: it only knows its names)."""
    acts = core or type(name, (Interface,), {})
    space: dict[str, Any] = {"__slots__": (), "__module__": "tensorrt.tensorrt"}
    for member in world.api.members[name]:
        full = f"{name}.{member}"
        if member == "__init__":
            continue
        if full in world.api.methods:
            space[member] = _method(full, member, core, world)
        else:
            space[member] = _property(full, member, core, world)
    space["__init__"] = _constructor(name, acts, world)
    for special in ("__bool__", "__len__", "__getitem__", "__str__"):
        if special in vars(acts):
            space[special] = _special(special)
    return _FacadeType(name, bases, space)


def _constructor(name: str, core: type[Core], world: World) -> Callable[..., None]:
    full = f"{name}.__init__"

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if full not in world.api.methods:
            raise TypeError(f"tensorrt.tensorrt.{name}: No constructor defined!")
        bound = bind(full, None, args, kwargs, world)
        attach(self, core(world, **{key: inside(value) for key, value in bound.items()}))

    return construct


def _special(name: str) -> Callable[..., Any]:
    return lambda self, *args: outside(getattr(type(self._core), name)(self._core, *args))


def _method(full: str, member: str, core: type[Core] | None, world: World) -> Callable[..., Any]:
    acts = getattr(core, member, None) if core else None

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = bind(full, self, args, kwargs, world)
        if acts is None:
            raise NotImplementedError(f"the stand-in of TensorRT {world.version} knows {full} but does not act it")
        return outside(acts(self._core, **{key: inside(value) for key, value in bound.items()}))

    call.__name__ = member
    return call


def _property(full: str, member: str, core: type[Core] | None, world: World) -> property:
    acts = getattr(core, member, None) if core else None
    known = isinstance(acts, property) or (core is not None and member in core.writable)

    def get(self: Any) -> Any:
        if not known:
            raise NotImplementedError(f"the stand-in of TensorRT {world.version} knows {full} but does not act it")
        return outside(getattr(self._core, member))

    def set_(self: Any, value: Any) -> None:
        annotation = core.writable.get(member) if core else None
        if annotation and not fits(value, annotation, world) and not (value is None and annotation in world.classes):
            raise TypeError(
                f"(): incompatible function arguments. The following argument types are supported:\n"
                f"    1. (arg0: tensorrt.tensorrt.{full.split('.')[0]}, arg1: {annotation}) -> None\n\n"
                f"Invoked with: {self!r}, {value!r}"
            )
        setattr(self._core, member, inside(value))

    settable = (core and member in core.writable) or (isinstance(acts, property) and acts.fset)
    return property(get, set_ if settable else None)


def bind(full: str, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], world: World) -> dict[str, Any]:
    """The arguments by name, from the first overload that they fit.

    Raises:
        TypeError: none fits, in the words of pybind11.
    """
    signatures = world.api.signatures[full]
    if not signatures:  # the table has no more than (*args, **kwargs)
        return {f"arg{place}": value for place, value in enumerate(args)} | kwargs
    for signature in signatures:
        bound = _bound(signature, args, kwargs, world)
        if bound is not None:
            return bound
    member = full.rpartition(".")[2]
    kind = "constructor" if member == "__init__" else "function"
    choices = "\n".join(f"    {place}. {item.text}" for place, item in enumerate(signatures, 1))
    given = [] if owner is None else [object.__repr__(owner)]
    given += [repr(value) for value in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    raise TypeError(
        f"{member}(): incompatible {kind} arguments. The following argument types are supported:\n{choices}\n\n"
        f"Invoked with: {', '.join(given)}"
    )


def _bound(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], world: World) -> dict[str, Any] | None:
    names = [parameter.name for parameter in signature.parameters]
    if len(args) > len(names) or set(kwargs) - set(names[len(args) :]):
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    for parameter in signature.parameters:
        if parameter.name not in given:
            if parameter.default is None:
                return None
        elif given[parameter.name] is None and parameter.default == "None":
            del given[parameter.name]  # the same as leaving it out
        elif not fits(given[parameter.name], parameter.annotation, world):
            return None
    return given


def fits(value: Any, annotation: str, world: World) -> bool:
    """Whether pybind11 would convert the value to the type of that name; what the stand-in cannot judge fits."""
    annotation = annotation.replace("collections.abc.", "").split("::")[-1]
    if annotation in world.enums:
        return isinstance(value, world.enums[annotation])
    if annotation == "ILogger.Severity" or annotation == "Severity":
        return isinstance(value, world.enums["Severity"])
    if annotation in ("int", "SupportsInt"):
        return not isinstance(value, (float, str, EnumMember)) and hasattr(value, "__int__")
    if annotation in ("float", "SupportsFloat"):
        return hasattr(value, "__float__") or hasattr(value, "__index__")
    if annotation == "bool":
        return isinstance(value, bool)
    if annotation == "str":
        return isinstance(value, (str, bytes))
    if annotation in ("Buffer", "buffer"):
        return _is_buffer(value)
    if annotation == "Dims":
        return isinstance(value, (tuple, list, world.classes["Dims"])) and all(
            fits(item, "int", world) for item in tuple(value)
        )
    if annotation.startswith(("Sequence[", "List[", "list[")):
        inner = annotation[annotation.index("[") + 1 : -1]
        return isinstance(value, (list, tuple, world.classes["Dims"])) and all(
            fits(item, inner, world) for item in tuple(value)
        )
    if annotation == "Weights" and isinstance(value, np.ndarray):
        return True  # converted. Source: pyFoundationalTypes.cpp
    if annotation in world.classes:
        return isinstance(value, world.classes[annotation])
    return True


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True
