"""What must lie in a target's memory at once, in bytes."""

from __future__ import annotations

from holov_export.estimate.roofline import Format
from holov_export.estimate.shapes import ModelShape
from holov_export.policies import Frozen

#: CUDA's context and the kernels of TensorRT, cuBLAS and ONNX Runtime. An assumption: 0.5 to 1.5 GiB are commonly seen.
RUNTIME_BYTES = 2**30


class Memory(Frozen):
    """Bytes, by what they hold. Activations are counted twice over: what a layer reads and what it writes."""

    vision_weights: int
    decoder_weights: int
    embeddings: int
    vision_activations: int
    decoder_activations: int
    kv_cache: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in type(self).model_fields)


def memory_of(
    shape: ModelShape, vision: Format, layers: Format, head: Format, *, prompt: int, context: int, batch: int
) -> Memory:
    """Memory of `batch` answers at once, each with room for `context` tokens, prefilled with `prompt` of them.

    The formats are of the vision tower, of the decoder's layers, and of its output matrix.
    """
    eyes, decoder = shape.vision, shape.decoder
    table = decoder.vocab_size * decoder.width
    inner = (eyes.mlp_matrices - 1) * eyes.mlp_width
    seen = batch * eyes.rows * max(5 * eyes.width, 2 * eyes.width + inner)
    read = batch * prompt * (4 * decoder.width + 2 * decoder.mlp_width)
    cached = 2 * decoder.layers * decoder.kv_heads * decoder.head_width
    return Memory(
        vision_weights=int(shape.vision_parameters * vision.weight),
        decoder_weights=int(decoder.layers * decoder.layer_parameters * layers.weight + table * head.weight),
        embeddings=0 if decoder.tied else int(table * layers.value),
        vision_activations=int(2 * seen * vision.value),
        decoder_activations=int(2 * read * layers.value) + 4 * batch * decoder.vocab_size,
        kv_cache=int(batch * context * cached * layers.key),
    )
