"""Reading single tensors out of safetensors shards, and what a damaged checkpoint says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from holov_export.errors import CheckpointError, MissingExtraError
from holov_export.policies import HolovPolicy
from holov_export.spec import ModelSpec, Precision
from holov_export.vision.clip import vision_from_checkpoint
from holov_export.vision.weights import INDEX, SINGLE, SafetensorsReader, shard_of_tensor, shard_path

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards: a and b in the first, c in the second."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.float16), "c": torch.zeros(1000)}
    save_file({name: tensors[name] for name in "ab"}, tmp_path / FIRST)
    save_file({"c": tensors["c"]}, tmp_path / SECOND)
    index = {"metadata": {}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_reads_over_shards(shards: Path) -> None:
    with SafetensorsReader(shards) as reader:
        assert sorted(reader) == ["a", "b", "c"]
        assert "a" in reader
        assert "d" not in reader
        assert reader.read(["a"]).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert reader.read(["b"]).dtype == torch.float16
        assert reader.read(["c"]).shape == (1000,)


def test_reads_a_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader:
        assert list(reader) == ["a"]
        assert reader.read(["a"]).tolist() == [1, 1]


def test_other_files_are_not_looked_at(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    save_file({"lora.a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert shard_of_tensor(tmp_path) == {"a": SINGLE}
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        shard_of_tensor(tmp_path)


def test_the_index_goes_before_the_single_file(shards: Path) -> None:
    save_file({"old": torch.ones(2)}, shards / SINGLE)
    assert shard_of_tensor(shards) == {"a": FIRST, "b": FIRST, "c": SECOND}


@pytest.mark.parametrize("file", ["../outside.safetensors", "sub/inside.safetensors", "/etc/hostname", "..", ""])
def test_shards_lie_in_the_folder_itself(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="is missing from the checkpoint"):
        shard_path(folder, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with SafetensorsReader(folder) as reader, pytest.raises(CheckpointError, match="is missing from the checkpoint"):
        reader.read(["a"])


def test_a_missing_package_is_no_damage(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with SafetensorsReader(shards) as reader, pytest.raises(MissingExtraError, match="safetensors"):
        reader.read(["a"])


def test_takes_the_first_name_that_exists(shards: Path) -> None:
    with SafetensorsReader(shards) as reader:
        assert reader.read(["new.a", "a", "b"]).shape == (2, 3)


def test_counts_only_what_was_read(shards: Path) -> None:
    with SafetensorsReader(shards) as reader:
        assert reader.bytes_read == 0
        reader.read(["a"])
        assert reader.bytes_read == 24
        assert "c" in reader
        assert reader.bytes_read == 24
        reader.read(["b"])
        assert reader.bytes_read == 34


def test_a_shard_that_is_not_needed_is_not_opened(shards: Path) -> None:
    (shards / SECOND).unlink()
    with SafetensorsReader(shards) as reader:
        assert reader.read(["a"]).shape == (2, 3)


def test_vision_reads_the_tower_and_the_projector_only(llava_checkpoint: Path, llava_spec: ModelSpec) -> None:
    with SafetensorsReader(llava_checkpoint) as reader:
        module = vision_from_checkpoint(llava_spec, HolovPolicy(), reader, Precision.FP32)
        wanted = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        assert reader.bytes_read == wanted
        assert reader.bytes_read < (llava_checkpoint / SINGLE).stat().st_size / 2


def test_missing_tensor(shards: Path) -> None:
    with SafetensorsReader(shards) as reader, pytest.raises(CheckpointError, match="no tensor 'd'"):
        reader.read(["d", "model.d"])


def test_index_names_a_tensor_that_the_shard_lacks(shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps({"weight_map": {"ghost": FIRST}}))
    with SafetensorsReader(shards) as reader, pytest.raises(CheckpointError, match=f"{FIRST}.*damaged"):
        reader.read(["ghost"])


def test_missing_shard(shards: Path) -> None:
    (shards / SECOND).unlink()
    with SafetensorsReader(shards) as reader, pytest.raises(CheckpointError, match=f"{SECOND} is missing"):
        reader.read(["c"])


@pytest.mark.parametrize("left", [0, 4, 60, 500, 2000])
def test_truncated_shard(left: int, shards: Path) -> None:
    whole = (shards / SECOND).read_bytes()
    (shards / SECOND).write_bytes(whole[:left])
    with SafetensorsReader(shards) as reader, pytest.raises(CheckpointError, match="truncated or damaged"):
        reader.read(["c"])


def test_truncated_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(200)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": 3}', '{"weights": {}}', "null", "\x00\xff"])
def test_corrupt_index(text: str, shards: Path) -> None:
    (shards / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="does not parse"):
        SafetensorsReader(shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00003.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="pickled") as caught:
        SafetensorsReader(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors"):
        SafetensorsReader(tmp_path)


def test_closed_reader_lets_the_shards_go(shards: Path) -> None:
    with SafetensorsReader(shards) as reader:
        tensor = reader.read(["a"])
    (shards / FIRST).unlink()
    assert tensor.sum() == 15
