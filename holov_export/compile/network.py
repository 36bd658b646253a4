"""The graph as a TensorRT network. How a network is made differs between TensorRT 8, 10 and 11; the parser is the same.

The weights stay where they are: the parser gets the graph as bytes and the path of vision.onnx, beside which it finds
vision.onnx.data. So a graph that was lowered in memory needs no second file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holov_export.errors import EngineError
from holov_export.versions import version_from_text

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class ParsedNetwork:
    """A network and the parser that made it. The parser owns the weights: it has to live until the engine is built."""

    network: Any
    parser: Any


def network_from_graph(trt: Any, builder: Any, logger: Any, model: ModelProto, path: Path) -> ParsedNetwork:
    """Parse a graph.

    Args:
        trt: the module `tensorrt`. builder, logger: of it.
        model: the graph, its weights outside.
        path: vision.onnx of the bundle; the weights are found beside it.

    Raises:
        EngineError: TensorRT does not parse it; the message names every node that it complains of.
    """
    network = builder.create_network(_creation_flags(trt))
    if network is None:
        raise EngineError(f"TensorRT {trt.__version__} could not make a network.")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString(), str(path)):
        problems = _problems(parser, model, trt.__version__)
        raise EngineError(
            f"TensorRT {trt.__version__} does not parse the graph: {'; '.join(problems) or 'it does not say why'}.",
            hint="`holov-export check` names what to change.",
        )
    return ParsedNetwork(network, parser)


def _creation_flags(trt: Any) -> int:
    """TensorRT 8 wants explicit batches, 10 is asked for strong typing, 11 knows nothing else."""
    version = version_from_text(trt.__version__)
    flags = trt.NetworkDefinitionCreationFlag
    if version >= (11,):
        return 0
    return 1 << int(flags.STRONGLY_TYPED if version >= (9,) else flags.EXPLICIT_BATCH)


def _problems(parser: Any, model: ModelProto, version: str) -> list[str]:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"{_node(error, model, version)}{str(error.desc()).strip()}")
    return list(dict.fromkeys(found))


def _node(error: Any, model: ModelProto, version: str) -> str:
    """What stands before an error of a node: its name and operator; nothing where it is of none."""
    if version_from_text(version) >= (10,) and error.node_name():
        return f"{error.node_name()} ({error.node_operator()}): "
    index = int(error.node())
    if not 0 <= index < len(model.graph.node):
        return ""
    node = model.graph.node[index]
    return f"{node.name or node.output[0]} ({node.op_type}): "
