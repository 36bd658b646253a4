"""Weights, Refitter and OnnxParserRefitter: putting weights into an engine that was built with REFIT or STRIP_PLAN."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from tensorrt_standin.engine import ICudaEngine, weights_of
from tensorrt_standin.facade import Core
from tensorrt_standin.numbers import Numbers
from tensorrt_standin.plan import put_weights

if TYPE_CHECKING:
    from tensorrt_standin.world import World

_FROM_BYTES = 64  # smaller initializers are not weights, as in `plan.strip_weights`


class Weights(Core):
    """An array by another name; only the form made from a numpy array acts."""

    def __init__(self, world: World, arg0: Any = None, a: Any = None) -> None:
        super().__init__(world)
        self.array = np.asarray(arg0 if a is None else a)

    @property
    def size(self) -> int:
        return int(self.array.size)

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def numpy(self) -> np.ndarray:
        return self.array

    def __len__(self) -> int:
        return self.size


class Refitter(Core):
    """New weights for one engine."""

    writable: ClassVar[dict[str, str]] = {"max_threads": "int", "weights_validation": "bool"}

    def __init__(self, world: World, engine: ICudaEngine, logger: Any) -> None:
        super().__init__(world)
        if not engine.refittable:
            world.log(logger, "ERROR", "Error Code 4: API Usage Error (the engine is not refittable)")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.engine, self._logger = engine, logger
        self.max_threads, self.weights_validation = 1, True
        self.given: dict[str, onnx.TensorProto] = {}

    @property
    def logger(self) -> Any:
        return self._logger

    def get_all_weights(self) -> list[str]:
        large = (
            name for name, item in weights_of(self.engine.plan.model).items() if np.prod(item.dims) * 4 >= _FROM_BYTES
        )
        return sorted({*large, *self.engine.plan.stripped})

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.plan.stripped if name not in self.given]

    def set_named_weights(self, name: str, weights: Any, location: Any = None) -> bool:
        item = weights_of(self.engine.plan.model).get(name)
        array = np.asarray(weights.array if isinstance(weights, Weights) else weights)
        if item is None or array.size != np.prod(item.dims):
            return False
        self.given[name] = numpy_helper.from_array(array.reshape(tuple(item.dims)), name)
        return True

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            text = f"Error Code 4: Internal Error (missing weights: {', '.join(self.get_missing_weights())})"
            self.world.log(self._logger, "ERROR", text)
            return False
        plan = self.engine.plan
        plan.model, plan.stripped = put_weights(plan.model, self.given), []
        self.engine.numbers = Numbers(plan)
        self.given = {}
        return True

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        return self.refit_cuda_engine()


class OnnxParserRefitter(Core):
    """Weights from the ONNX file that the engine was built from."""

    def __init__(self, world: World, refitter: Refitter, logger: Any) -> None:
        super().__init__(world)
        self.refitter, self.logger = refitter, logger
        self.errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def clear_errors(self) -> None:
        self.errors.clear()

    def refit_from_file(self, model: str) -> bool:
        path = Path(model if isinstance(model, str) else model.decode())
        return path.is_file() and self.refit_from_bytes(path.read_bytes(), str(path))

    def refit_from_bytes(self, model: Any, path: str | None = None) -> bool:
        proto = onnx.load_model_from_string(bytes(memoryview(model)))
        load_external_data_for_model(proto, str(Path(path or ".").parent))
        wanted = set(self.refitter.get_all_weights())
        for item in proto.graph.initializer:
            if item.name in wanted:
                self.refitter.given[item.name] = item
        missing = wanted - set(self.refitter.given)
        self.errors += sorted(missing)
        return not missing
