"""Checkpoints whose language model is stored in 4 bits, as AutoAWQ (its "GEMM" layout) and AutoGPTQ write them.

Written from the layouts, with numpy: an int32 holds eight numbers of 4 bits; AWQ packs along the outputs, in the order
0 2 4 6 1 3 5 7, GPTQ packs the weights along the inputs, and stores each zero point less one.

Source: casper-hansen/AutoAWQ awq/modules/linear/gemm.py (WQLinear_GEMM.from_linear), AutoGPTQ/AutoGPTQ
auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (QuantLinear.pack).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Array = npt.NDArray[np.generic]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LINEAR = re.compile(r"language_model.*layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight$")


@dataclass(frozen=True)
class Rounded:
    """A Linear's weights in 4 bits: numbers 0..15 [in, out], zero points and scales [groups, out]."""

    numbers: npt.NDArray[np.int32]
    zeros: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float16]
    group: npt.NDArray[np.int32]

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """float32 [out, in], as transformers holds it."""
        scales = self.scales.astype(np.float32)[self.group]
        return np.ascontiguousarray(((self.numbers - self.zeros[self.group]) * scales).T)


def rounded(weight: npt.NDArray[np.float32], size: int, *, shuffled: bool = False) -> Rounded:
    """A weight [out, in] by groups of `size` inputs, each with its own range; `shuffled`: groups are no neighbours."""
    inputs = weight.shape[1]
    group = np.arange(inputs, dtype=np.int32) // size
    if shuffled:
        group = np.random.default_rng(inputs).permutation(group).astype(np.int32)
    ordered = weight.T[np.argsort(group, kind="stable")].reshape(inputs // size, size, -1)
    low, high = np.minimum(ordered.min(axis=1), 0), np.maximum(ordered.max(axis=1), 0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 1, 15).astype(np.int32)
    numbers = np.rint(weight.T / scales.astype(np.float32)[group]) + zeros[group]
    return Rounded(np.clip(numbers, 0, 15).astype(np.int32), zeros, scales, group)


def packed(numbers: npt.NDArray[np.int32], order: tuple[int, ...] = tuple(range(8))) -> npt.NDArray[np.int32]:
    """Numbers [rows, columns] as int32 [rows, columns / 8]."""
    eights = numbers.astype(np.uint32).reshape(len(numbers), -1, 8)
    words = np.zeros(eights.shape[:2], dtype=np.uint32)
    for place, source in enumerate(order):
        words |= eights[:, :, source] << np.uint32(4 * place)
    return words.view(np.int32)


def awq_tensors(made: Rounded) -> dict[str, Array]:
    """What AutoAWQ stores instead of `weight`."""
    return {
        "qweight": packed(made.numbers, AWQ_ORDER),
        "qzeros": packed(made.zeros, AWQ_ORDER),
        "scales": made.scales,
    }


def gptq_tensors(made: Rounded) -> dict[str, Array]:
    """What AutoGPTQ stores instead of `weight`."""
    return {
        "qweight": np.ascontiguousarray(packed(np.ascontiguousarray(made.numbers.T)).T),
        "qzeros": packed(made.zeros - 1),
        "scales": made.scales,
        "g_idx": made.group,
    }


_TENSORS: dict[str, Callable[[Rounded], dict[str, Array]]] = {"awq": awq_tensors, "gptq": gptq_tensors}


def quantised_checkpoint(
    source: Path, target: Path, method: Literal["awq", "gptq"], *, size: int = 32, shuffled: bool = False
) -> tuple[Path, Path]:
    """(a checkpoint in 4 bits, the same one with the rounded weights in float32)."""
    config = json.loads((source / "config.json").read_text())
    tensors = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    whole, plain = {}, {}
    for name, value in tensors.items():
        if LINEAR.search(name) is None:
            whole[name] = plain[name] = value
            continue
        made = rounded(value.numpy(), size, shuffled=shuffled)
        plain[name] = torch.from_numpy(made.weight)
        stem = name.removesuffix("weight")
        whole |= {stem + part: torch.from_numpy(array) for part, array in _TENSORS[method](made).items()}
    own = {"quant_method": method, "bits": 4, "group_size": size}
    own |= {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["vision_tower"]} if method == "awq" else {
        "desc_act": shuffled, "sym": False, "checkpoint_format": "gptq", "damp_percent": 0.01
    }  # fmt: skip
    for folder, kept, extra in (
        (target / method, whole, {"quantization_config": own}),
        (target / "float", plain, {}),
    ):
        shutil.copytree(source, folder)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | extra, indent=2))
    return target / method, target / "float"
