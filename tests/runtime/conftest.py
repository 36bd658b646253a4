"""Fixtures of the runners: engines that the real builder made against a stand-in of TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime.engines import Foundry

from holov_export.bundle import Bundle
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovPolicy
from holov_export.request import ExportRequest
from holov_export.spec import Precision


@pytest.fixture(scope="session")
def half_bundle(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The checkpoint exported for real: float16, HoloV, no decoder, not verified."""
    request = ExportRequest(
        model=str(llava_checkpoint),
        policy=HolovPolicy(),
        precision=Precision.FP16,
        decoder=None,
        output=tmp_path_factory.mktemp("bundles") / "half",
        verify=False,
    )
    return export_bundle(request)[0]


@pytest.fixture(scope="session")
def foundry(tmp_path_factory: pytest.TempPathFactory) -> Foundry:
    return Foundry(tmp_path_factory.mktemp("engines"))
