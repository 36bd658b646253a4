"""The tables that name families agree, and every model of the catalogue is of a family that is known."""

from __future__ import annotations

from typing import get_args

from holov_export.catalog import CATALOG
from holov_export.export.checkpoint import known_families
from holov_export.runtime.decoder_hf import CLASSES
from holov_export.spec import ModelSpec
from holov_export.vision.families import FAMILIES


def test_each_family_has_a_reader_a_tower_and_a_class_of_transformers() -> None:
    families = set(get_args(ModelSpec.model_fields["family"].annotation))
    assert set(known_families()) == families
    assert set(FAMILIES) == families
    assert set(CLASSES) == families


def test_the_catalogue_pins_what_it_names() -> None:
    hub = [entry for entry in CATALOG.values() if entry.repository]
    assert len(hub) == 8
    for entry in hub:
        assert len(entry.revision) == 40, entry.name
        assert int(entry.revision, 16) > 0
