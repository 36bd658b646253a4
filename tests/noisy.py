"""A checkpoint in which no two weights are alike: fresh transformers models have zero biases and norms of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def noisy_copy(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint directory with noise on everything in its tower and projector."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / WEIGHTS)
    dice = torch.Generator().manual_seed(1)
    for name in sorted(tensors):
        if "vision_tower" in name or "multi_modal_projector" in name:
            noise = torch.randn(tensors[name].shape, generator=dice) * 0.05
            tensors[name] = tensors[name] + noise.to(tensors[name].dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
