"""Fixtures that many tests share: a tiny LLaVA checkpoint, its GenAI decoder, and a bundle with a toy vision graph."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the network

import numpy as np
import pytest
from checkpoints import write_checkpoint
from PIL import Image
from skimage import data
from toys import write_toy_bundle

from holov_export.bundle import Bundle
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovPolicy
from holov_export.request import ExportRequest
from holov_export.spec import DecoderPrecision, ModelSpec, Precision


@pytest.fixture(autouse=True)
def no_stand_in_stays() -> Iterator[None]:
    """A stand-in of TensorRT that one test leaves behind would be found by the next ones."""
    before = sys.modules.get("tensorrt")
    yield
    assert sys.modules.get("tensorrt") is before


@pytest.fixture(scope="session")
def llava_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random LLaVA checkpoint with 64 patch tokens; see `checkpoints.TinyLlava` for its sizes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llava")


@pytest.fixture(scope="session")
def llava_spec(llava_checkpoint: Path) -> ModelSpec:
    """What the checkpoint says of itself."""
    return spec_from_checkpoint(llava_checkpoint, "tiny-llava")


@pytest.fixture(scope="session")
def genai_folder(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's float32 decoder for ONNX Runtime GenAI."""
    folder = tmp_path_factory.mktemp("decoders") / "fp32"
    decoder_from_checkpoint(llava_checkpoint, folder, llava_spec.decoder, DecoderPrecision.FP32)
    return folder


@pytest.fixture(scope="session")
def toy_bundle(llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle without a decoder whose vision graph keeps the first `quota` patches; see `toys`."""
    return write_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy", llava_spec, llava_checkpoint)


@pytest.fixture(scope="session")
def answering_bundle(
    llava_checkpoint: Path, llava_spec: ModelSpec, genai_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The toy bundle with the GenAI decoder in it."""
    folder = tmp_path_factory.mktemp("bundles") / "answering"
    return write_toy_bundle(folder, llava_spec, llava_checkpoint, decoder=genai_folder)


@pytest.fixture(scope="session")
def exported_bundle(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The checkpoint exported for real: float32, HoloV, no decoder, not verified."""
    request = ExportRequest(
        model=str(llava_checkpoint),
        policy=HolovPolicy(),
        precision=Precision.FP32,
        decoder=None,
        output=tmp_path_factory.mktemp("bundles") / "exported",
        verify=False,
    )
    return export_bundle(request)[0]


@pytest.fixture(scope="session")
def complete_bundle(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The checkpoint exported for real with its decoder: float32, HoloV, not verified."""
    request = ExportRequest(
        model=str(llava_checkpoint),
        policy=HolovPolicy(),
        precision=Precision.FP32,
        decoder=DecoderPrecision.FP32,
        output=tmp_path_factory.mktemp("bundles") / "complete",
        verify=False,
    )
    return export_bundle(request)[0]


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Four real photographs of different shapes."""
    pictures = (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    return [Image.fromarray(np.asarray(picture)) for picture in pictures]


@pytest.fixture(scope="session")
def pictures(photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the four photographs, which no test changes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(photographs):
        picture.save(folder / f"{number}.png")
    return folder
