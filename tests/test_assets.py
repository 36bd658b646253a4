from __future__ import annotations

import pytest

from holov_export.assets import data_folder
from holov_export.errors import EnvironmentFaultError


@pytest.mark.parametrize("name", ["demo-scenes", "engines", "calibration"])
def test_shipped_folders_are_found(name: str) -> None:
    assert any(data_folder(name).iterdir())


def test_missing_folder_is_a_fault_of_the_installation() -> None:
    with pytest.raises(EnvironmentFaultError, match="'no-such-folder' is missing"):
        data_folder("no-such-folder")
