"""How long pieces of work take on a target: peak rates, and the share of them that kernels reach.

Every matrix product takes the longer of its arithmetic and its memory traffic; what lies between products (norms,
activations, residuals) only moves memory; every kernel costs a fixed time on top. One set of shares for all models,
all targets and all budgets: `SHARES`, with the reason for each value.
"""

from __future__ import annotations

from dataclasses import dataclass

from holov_export.targets import EngineTarget, TargetPrecision


@dataclass(frozen=True)
class Shares:
    """What kernels reach of the peaks.

    They are round numbers within what is commonly seen of such kernels, and they were settled with the published
    figures of docs/estimates.md in view: that comparison shows how far one set carries, it is not a blind test.

    Attributes:
        product: of the dense rate, by a matrix product whose operands have one type. Large fp16 products reach 60 to
            80 % of it on tensor cores; those of a vision tower are not large.
        weight_only: of the fp16 rate, by a product that unpacks 4-bit weights: the unpacking takes issue slots.
        attention: of the fp16 rate, by fused attention, which waits for its softmax.
        bandwidth: of the memory's peak, by kernels that read or write once, front to back.
        kernel_seconds: launching and draining one kernel, from a captured graph of them.
        tile: rows and columns of a product that one multiprocessor computes at a time; fewer tiles than multiprocessors
            leave some of them idle.
    """

    product: float = 0.6
    weight_only: float = 0.5
    attention: float = 0.35
    bandwidth: float = 0.8
    kernel_seconds: float = 2e-6
    tile: tuple[int, int] = (64, 64)


SHARES = Shares()


@dataclass(frozen=True)
class Format:
    """How numbers are stored and multiplied.

    Attributes:
        rate: peak dense operations a second of products. weight_only: weights are unpacked before they are multiplied.
        weight: bytes of a weight, scales included. value: bytes of an activation.
        stored: bytes of a key's or a value's number in a decoder's cache; None for those of an activation.
    """

    rate: float
    weight: float
    value: float
    weight_only: bool = False
    stored: float | None = None

    @property
    def key(self) -> float:
        """Bytes of one number of the keys and values that attention reads."""
        return self.value if self.stored is None else self.stored


#: bytes of one weight. int4: half a byte and a 16-bit scale for each group of 32, as ONNX Runtime GenAI's builder
#: makes them (block size 32). Source: onnxruntime-genai builder, default of int4_block_size
WEIGHT_BYTES: dict[str, float] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / 32}


def format_of(target: EngineTarget, precision: TargetPrecision) -> Format:
    """How `target` holds and multiplies `precision`. int8 and fp8 keep what lies between products in fp16.

    Raises:
        ValueError: the target has no rate for it (callers refuse that before, with the reason).
    """
    rate = target.rate(precision)
    if rate is None:
        raise ValueError(f"{target.name} has no rate for {precision}")
    value = 4.0 if precision == "fp32" else 2.0
    return Format(rate * 1e12, WEIGHT_BYTES[precision], value, weight_only=precision == "int4")


@dataclass(frozen=True)
class Machine:
    """A target at work. Every method gives seconds."""

    target: EngineTarget
    shares: Shares = SHARES

    @property
    def _bandwidth(self) -> float:
        return self.target.bandwidth_gbs * 1e9 * self.shares.bandwidth

    def product(self, form: Format, rows: int, inner: int, columns: int) -> float:
        """[rows, inner] times weights [inner, columns]."""
        share = self.shares.weight_only if form.weight_only else self.shares.product
        tile = min(rows, self.shares.tile[0]) * min(columns, self.shares.tile[1])
        # no product ends before one of its tiles does, on one multiprocessor
        results = max(rows * columns, tile * self.target.multiprocessors)
        arithmetic = 2 * inner * results / (form.rate * share)
        traffic = inner * columns * form.weight + rows * (inner + columns) * form.value
        return max(arithmetic, traffic / self._bandwidth) + self.shares.kernel_seconds

    def attention(self, form: Format, rows: int, keys: int, width: int, key_width: int, *, batch: int = 1) -> float:
        """`rows` queries over `keys`, for each of `batch`; `width` of all heads, `key_width` of the heads of keys."""
        rate = (self.target.rate("fp32" if form.value == 4 else "fp16") or 0.0) * 1e12
        arithmetic = 4 * batch * rows * keys * width / (rate * self.shares.attention)
        traffic = batch * (2 * rows * width * form.value + 2 * keys * key_width * form.key)
        return max(arithmetic, traffic / self._bandwidth) + self.shares.kernel_seconds

    def moved(self, values: float, form: Format, *, kernels: int = 1) -> float:
        """Kernels that read and write `values` activations between them."""
        return values * form.value / self._bandwidth + kernels * self.shares.kernel_seconds
