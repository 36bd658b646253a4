"""One installed stand-in: its version, its GPU, the classes it made, and what happened in it."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorrt_standin.api import Api, api, older
from tensorrt_standin.cuda_runtime import FakeCuda
from tensorrt_standin.cuda_types import FakeGpu
from tensorrt_standin.enums import SEVERITIES, EnumMember, enum_from_members
from tensorrt_standin.facade import Core, Facade, Interface, facade_from_core
from tensorrt_standin.values import DIMS_SIZES, HostMemory, dims_class

if TYPE_CHECKING:
    from tensorrt_standin.builder import Build

#: Users subclass these. Source: the py::init<> trampolines of pyCore.cpp and pyPlugin.cpp
_INTERFACES = {"ILogger", "Logger", "IProgressMonitor", "IOutputAllocator", "IGpuAllocator", "IGpuAsyncAllocator"}
_INTERFACES |= {"IProfiler", "Profiler", "IErrorRecorder", "IDebugListener", "IStreamReader", "IStreamReaderV2"}
_INTERFACES |= {"IStreamWriter"}
#: Source: the bindings' __init__.py
_WITH = {"ILogger", "ICudaEngine", "IExecutionContext", "Runtime", "IHostMemory", "Builder", "INetworkDefinition"}
_WITH |= {"OnnxParser", "IBuilderConfig"}
_WITH_BEFORE_10 = {"Refitter"}
#: Where the base is not ILayer. Source: the __mro__ of 8.6.0's classes
_PARENTS = {
    "Logger": "ILogger",
    "Profiler": "IProfiler",
    "IPluginV2Ext": "IPluginV2",
    "IConditionLayer": "IIfConditionalBoundaryLayer",
    "IIfConditionalInputLayer": "IIfConditionalBoundaryLayer",
    "IIfConditionalOutputLayer": "IIfConditionalBoundaryLayer",
    "IIteratorLayer": "ILoopBoundaryLayer",
    "ILoopOutputLayer": "ILoopBoundaryLayer",
    "IRecurrenceLayer": "ILoopBoundaryLayer",
    "ITripLimitLayer": "ILoopBoundaryLayer",
    "IInt8EntropyCalibrator": "IInt8Calibrator",
    "IInt8EntropyCalibrator2": "IInt8Calibrator",
    "IInt8LegacyCalibrator": "IInt8Calibrator",
    "IInt8MinMaxCalibrator": "IInt8Calibrator",
}
_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "bool": "BOOL"}
_ITEMSIZE = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1, "FP8": 1}
_ITEMSIZE |= {"INT4": 0.5, "FP4": 0.5}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
_NUMPY |= {"BOOL": np.bool_, "UINT8": np.uint8}


class World:
    """Everything behind one stand-in module.

    Attributes:
        messages: (severity, text) of all that was logged, whatever the logger did with it.
        builds: one record for each engine that was built.
    """

    def __init__(self, version: str, gpu: FakeGpu | None, cores: dict[str, type[Core]]) -> None:
        self.version = version
        self.api: Api = api(version)
        self.gpu = gpu
        self.cuda = FakeCuda(gpu)
        self.messages: list[tuple[str, str]] = []
        self.builds: list[Build] = []
        self.enums: dict[str, type[EnumMember]] = {
            name: enum_from_members(name, members, old=self.before("10.0.0"))
            for name, members in self.api.enums.items()
        }
        self.enums["Severity"] = enum_from_members("Severity", dict(SEVERITIES))
        self.classes: dict[str, type] = {}
        for name in self.api.members:
            if name and name not in self.enums:
                self._add_class(name, cores)
        self._finish_enums()
        self.module = self._module()

    def before(self, version: str) -> bool:
        return older(self.version, version)

    def enum(self, name: str, member: str) -> Any:
        """A member by name; the world must have it."""
        return getattr(self.enums[name], member)

    def require_gpu(self, what: str) -> FakeGpu:
        """Real TensorRT without a driver: Builder fails, Runtime kills the process. Nobody may get that far."""
        if self.gpu is None:
            raise AssertionError(f"{what} was made on a machine without a GPU; ask the CUDA driver first")
        return self.gpu

    def log(self, logger: Any, severity: str, text: str) -> None:
        """An exception in the logger is printed and swallowed (seen in 8.6.0)."""
        self.messages.append((severity, text))
        try:
            logger.log(self.enum("Severity", severity), text)
        except Exception as error:
            print(f"[ERROR] Exception caught in log(): {error}", file=sys.stderr)

    def leaked(self) -> list[str]:
        return self.cuda.leaked()

    # ---- making the module

    def _add_class(self, name: str, cores: dict[str, type[Core]]) -> None:
        if name in self.classes:
            return
        if name in DIMS_SIZES:
            self.classes.setdefault("Dims", dims_class("Dims", None))
            base = {"Dims": None, "DimsHW": "Dims2"}.get(name, "Dims")
            if base and base not in self.classes:
                self._add_class(base, cores)
            if name != "Dims":
                self.classes[name] = dims_class(name, self.classes[base or "Dims"])
            return
        if name == "IHostMemory":
            self.classes[name] = HostMemory
            return
        core = cores.get(name)
        if core is None and name in _INTERFACES:
            core = type(name, (Interface,), {})
        parent = self._parent(name)
        if parent:
            self._add_class(parent, cores)
        bases = (self.classes[parent],) if parent else (Facade,)
        self.classes[name] = facade_from_core(name, core, bases, self)

    def _parent(self, name: str) -> str | None:
        parent = _PARENTS.get(name, "ILayer" if name.endswith("Layer") and name != "ILayer" else None)
        return parent if parent in self.api.members else None

    def _finish_enums(self) -> None:
        data_type = self.enums["DataType"]
        data_type.itemsize = property(lambda member: _ITEMSIZE.get(member.name))
        for name in ("ILogger", "Logger"):
            cls = self.classes[name]
            type.__setattr__(cls, "Severity", self.enums["Severity"])
            for member in SEVERITIES:
                type.__setattr__(cls, member, self.enum("Severity", member))
        for name in _WITH | (_WITH_BEFORE_10 if self.before("10.0.0") else set()):
            type.__setattr__(self.classes[name], "__enter__", _enter)
            type.__setattr__(self.classes[name], "__exit__", _exit)

    def _module(self) -> ModuleType:
        """The module, with nothing in it that the table does not name."""
        space: dict[str, Any] = {**self.classes, **self.enums}
        space |= {"common_enter": _enter, "common_exit": _exit, "volume": _volume, "nptype": self._nptype}
        space |= {"init_libnvinfer_plugins": self._init_plugins, "get_nv_onnx_parser_version": self._parser_version}
        space |= {"get_plugin_registry": self._registry, "get_builder_plugin_registry": self._registry}
        module, inner = ModuleType("tensorrt"), ModuleType("tensorrt.tensorrt")
        for name in self.api.members[""]:
            if name in space:
                value = space[name]
            elif name[0].islower() and hasattr(self.enums["DataType"], _NAMES.get(name, name.upper())):
                value = self.enum("DataType", _NAMES.get(name, name.upper()))
            else:
                value = sys.modules.get(name, inner if name == "tensorrt" else None)
            setattr(module, name, value)
            if name in self.classes or name in self.enums:
                setattr(inner, name, value)
        module.__version__ = self.version
        module.__path__ = []
        return module

    def _nptype(self, trt_type: Any) -> Any:
        name = trt_type.name
        if name not in _NUMPY or (name == "INT64" and self.before("9.0.0")):
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return _NUMPY[name]

    def _init_plugins(self, logger: Any, namespace: str) -> bool:
        return True

    def _parser_version(self) -> int:
        return 100  # of the parser's own count; seen in 8.6.0

    def _registry(self, *args: Any) -> Any:
        cls = self.classes["IPluginRegistry"]
        return cls.__new__(cls)


def _enter(this: Any) -> Any:
    text = "Context managers for TensorRT types are deprecated. "
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return this


def _exit(this: Any, exc_type: Any, exc_value: Any, traceback: Any) -> None:
    return None


def _volume(iterable: Any) -> int:
    return int(np.prod([int(item) for item in iterable], dtype=np.int64))
