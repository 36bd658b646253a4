"""Compiled engines for tests: built by the real builder against a stand-in, kept for the whole session."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import tensorrt_standin
from tensorrt_standin import FakeGpu

from holov_export.bundle import Bundle, open_bundle
from holov_export.compile.compilation import CompileOptions
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.spec import ModelSpec
from holov_export.targets import target_from_name
from holov_export.tensors import PixelBatch

H200 = FakeGpu()


class Foundry:
    """Copies of a bundle with an engine in them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.bundle_with_engine = lru_cache(maxsize=None)(self._bundle_with_engine)

    def _bundle_with_engine(
        self,
        source: Path,
        version: str,
        *,
        profiles: tuple[str, ...] = ("batch=1:1:3,budget=1:7:64",),
        gpu: FakeGpu = H200,
        strip_plan: bool = False,
        weight_streaming: bool = False,
        version_compatible: bool = False,
    ) -> Bundle:
        """A copy of the bundle with an engine for the H200, built by TensorRT `version`."""
        folder = self._root / str(len(list(self._root.iterdir())))
        shutil.copytree(source, folder)
        bundle = open_bundle(folder, verify="size")
        options = CompileOptions(
            profiles=profiles,
            use_timing_cache=False,
            layer_report=False,
            strip_plan=strip_plan,
            weight_streaming=weight_streaming,
            version_compatible=version_compatible,
        )
        with tensorrt_standin.installed(version, gpu=gpu):
            engine_from_bundle(bundle, target_from_name("h200"), options)
        return bundle


def pixels_for(model: ModelSpec, images: int, seed: int = 0) -> PixelBatch:
    """Random pixels of the model's size."""
    side = model.vision.image_size
    values = np.random.default_rng(seed).standard_normal((images, 3, side, side)).astype(np.float32)
    return PixelBatch(values, (), ())
