"""The three stages of an answer in the time that a `Machine` needs for them: vision, prefill, one decoding step."""

from __future__ import annotations

from holov_export.estimate.roofline import Format, Machine, format_of
from holov_export.estimate.shapes import ModelShape, VisionShape

#: kernels of the selection itself (a softmax of one row, sums over crops, two sorts, a gather), tiny ones
SELECTION_KERNELS = 40
#: kernels of one step of a greedy rule, if the 16 operators of the loop's body (`export/scope_loop.py`) are fused well
STEP_KERNELS = 8


def vision_seconds(machine: Machine, shape: ModelShape, form: Format, *, budget: int, batch: int) -> float:
    """Pixels of `batch` images to K = `budget` rows of the language model's width for each."""
    vision = shape.vision
    rows = batch * vision.rows
    total = machine.product(form, rows, vision.patch_values, vision.width)
    if vision.attends_all:
        total += _packed_layers(machine, shape, form, budget=budget, batch=batch)
    else:
        for entering, kept in layer_rows(vision, budget):
            total += _vision_layer(machine, shape, form, entering=entering, kept=kept, batch=batch)
    if budget < vision.tokens:
        total += max(1, len(vision.cuts)) * SELECTION_KERNELS * machine.shares.kernel_seconds
    if vision.greedy:
        total += _greedy_seconds(machine, shape, steps=budget, batch=batch)
    projected = batch * (budget if vision.selects_early or vision.projects_kept else vision.projectable)
    merged = vision.width * vision.patches_per_token
    projector = machine.product(form, projected, merged, vision.projector_inner)
    projector += machine.moved(2 * projected * vision.projector_inner, form)
    projector += machine.product(form, projected, vision.projector_inner, shape.decoder.width)
    return total + vision.projectors * projector


def layer_rows(vision: VisionShape, budget: int) -> list[tuple[int, int]]:
    """(rows whose keys and values a layer computes, rows that it runs for) of each layer."""
    left = {cut.layer: min(max(budget, cut.keep or budget), vision.tokens) for cut in vision.cuts}
    if not left and vision.selects_early:
        left = {vision.layers - 1: budget}
    found, rows = [], vision.rows
    for layer in range(vision.layers):
        kept = rows
        if layer in left:
            behind = left[layer] + (vision.extra_tokens if layer < vision.layers - 1 else 0)
            kept = behind if vision.selects_early else rows
        found.append((rows, kept))
        rows = behind if layer in left else rows
    return found


def _greedy_seconds(machine: Machine, shape: ModelShape, *, steps: int, batch: int) -> float:
    """The similarities of all pairs of rows, float32, and `steps` rounds that read all of them once."""
    form, tokens = format_of(machine.target, "fp32"), shape.vision.tokens
    similarity = machine.product(form, batch * tokens, shape.vision.width, tokens)
    return similarity + steps * machine.moved(batch * tokens * tokens, form, kernels=STEP_KERNELS)


def _vision_layer(machine: Machine, shape: ModelShape, form: Format, *, entering: int, kept: int, batch: int) -> float:
    """One layer: keys and values for all rows that enter, everything else for `kept` rows of each image."""
    vision = shape.vision
    width, every, some = vision.width, batch * entering, batch * kept
    total = machine.moved(2 * every * width, form)  # norm
    if kept == entering:
        total += machine.product(form, every, width, 3 * width)
    else:
        total += machine.product(form, every, width, 2 * width) + machine.product(form, some, width, width)
    total += machine.attention(form, kept, entering, width, width, batch=batch)
    total += machine.product(form, some, width, width)
    total += machine.moved(3 * some * width, form)  # residual
    return total + _mlp(machine, vision, form, rows=some)


def _packed_layers(machine: Machine, shape: ModelShape, form: Format, *, budget: int, batch: int) -> float:
    """All layers where the last one's attention runs for all rows, and only its MLP for those of the kept tokens."""
    vision = shape.vision
    width, every = vision.width, batch * vision.rows
    attention = machine.moved(2 * every * width, form)  # norm
    attention += machine.product(form, every, width, 3 * width)
    attention += machine.product(form, every, width, width)
    attention += machine.moved(3 * every * width, form)  # residual
    last = batch * budget * vision.patches_per_token if vision.selects_early else every
    total = vision.layers * attention
    total += (vision.layers - 1) * _mlp(machine, vision, form, rows=every) + _mlp(machine, vision, form, rows=last)
    whole = vision.layers if not vision.window_rows else vision.full_layers
    rows, view = vision.window_rows, vision.rows_of_view
    total += whole * machine.attention(form, view, view, width, width, batch=batch * vision.views)
    if whole < vision.layers:
        windows = batch * -(-vision.rows // rows)
        total += (vision.layers - whole) * machine.attention(form, rows, rows, width, width, batch=windows)
    return total


def _mlp(machine: Machine, vision: VisionShape, form: Format, *, rows: int) -> float:
    """The second half of a layer for some rows."""
    inner, into = vision.mlp_width, vision.mlp_matrices - 1
    total = machine.moved(2 * rows * vision.width, form)  # norm
    total += machine.product(form, rows, vision.width, into * inner)
    total += machine.moved((into + 1) * rows * inner, form)  # activation
    total += machine.product(form, rows, inner, vision.width)
    return total + machine.moved(3 * rows * vision.width, form)  # residual


def prefill_seconds(
    machine: Machine, shape: ModelShape, form: Format, head: Format, *, prompt: int, batch: int
) -> float:
    """`prompt` rows of each of `batch` sequences through the decoder, to the logits of the last row."""
    decoder = shape.decoder
    total = decoder.layers * _decoder_layer(machine, shape, form, rows=prompt, past=0, batch=batch)
    return total + machine.product(head, batch, decoder.width, decoder.vocab_size)


def step_seconds(machine: Machine, shape: ModelShape, form: Format, head: Format, *, past: int, batch: int) -> float:
    """One token for each of `batch` sequences that hold `past` tokens."""
    decoder = shape.decoder
    total = decoder.layers * _decoder_layer(machine, shape, form, rows=1, past=past, batch=batch)
    return total + machine.product(head, batch, decoder.width, decoder.vocab_size)


def _decoder_layer(machine: Machine, shape: ModelShape, form: Format, *, rows: int, past: int, batch: int) -> float:
    decoder = shape.decoder
    width, mlp = decoder.width, decoder.mlp_width
    query, key = decoder.heads * decoder.head_width, decoder.kv_heads * decoder.head_width
    every = batch * rows
    # a causal row sees on average half of the rows before it
    keys = past + 1 if rows == 1 else past + rows // 2
    total = machine.moved(2 * every * width, form)  # norm
    total += machine.product(form, every, width, query + 2 * key)
    total += machine.moved(2 * every * (query + key), form)  # rotary embedding
    total += machine.attention(form, rows, keys, query, key, batch=batch)
    total += machine.product(form, every, query, width)
    total += machine.moved(5 * every * width, form, kernels=2)  # residual, norm
    total += machine.product(form, every, width, 2 * mlp)
    total += machine.moved(3 * every * mlp, form)  # gate
    total += machine.product(form, every, mlp, width)
    return total + machine.moved(3 * every * width, form)  # residual
