"""Read single tensors out of a Hugging Face checkpoint's safetensors shards, without loading the rest.

Only safetensors is read: a pickle can run code, so `pytorch_model.bin` is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from holov_export.errors import CheckpointError, HolovExportError
from holov_export.extras import require

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass
class SafetensorsReader:
    """The tensors of a checkpoint directory by name; a context manager.

    Shards are opened when first needed and mapped, so only the pages of the tensors that are asked for are read.

    Attributes:
        folder: the checkpoint. bytes_read: size of the tensors handed out so far.
    """

    folder: Path
    bytes_read: int = 0
    _shard_of: dict[str, str] = field(default_factory=dict)
    _open: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shard_of = shard_of_tensor(self.folder)

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the shards."""
        self._open.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def read(self, names: Iterable[str]) -> torch.Tensor:
        """The first of several possible names that exists, as the checkpoint stores it.

        Raises:
            CheckpointError: none exists, or its shard is missing or damaged.
        """
        candidates = list(names)
        for name in candidates:
            if name in self._shard_of:
                try:
                    tensor: torch.Tensor = self._shard(self._shard_of[name]).get_tensor(name)
                except Exception as error:  # safetensors raises its own type, a bare KeyError or an OSError
                    if isinstance(error, HolovExportError):
                        raise
                    raise damaged_shard(self._shard_of[name], error) from error
                self.bytes_read += tensor.numel() * tensor.element_size()
                return tensor
        raise CheckpointError(
            f"the checkpoint has no tensor '{candidates[0]}'.",
            hint="It is incomplete, or of a family that is not supported.",
        )

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            path = shard_path(self.folder, file)
            safetensors = require("safetensors")
            try:
                self._open[file] = safetensors.safe_open(path, framework="pt")
            except Exception as error:  # safetensors_rust.SafetensorError is not exported as a type to catch
                raise damaged_shard(file, error) from error
        return self._open[file]


def damaged_shard(file: str, reason: object) -> CheckpointError:
    """The error for a shard that cannot be read."""
    return CheckpointError(f"the shard {file} is truncated or damaged ({reason}).", hint="Download it again.")


def shard_path(folder: Path, file: str) -> Path:
    """The path of a shard that `shard_of_tensor` names.

    Raises:
        CheckpointError: there is no such file directly in `folder`.
    """
    path = folder / file
    if path.parent != folder or not path.is_file():
        raise CheckpointError(f"the shard {file} is missing from the checkpoint.", hint="Download it again.")
    return path


def shard_of_tensor(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index, or from `model.safetensors` where there is no index.

    Other safetensors files (consolidated copies, adapters) are not looked at. Shards that an index names are not
    opened, and need not exist as long as nobody wants their tensors.

    Raises:
        CheckpointError: no weights, only pickled ones, or an index or single file that is damaged.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{INDEX} does not parse ({error}).", hint="Download it again.") from error
    single = folder / SINGLE
    if single.is_file():
        safetensors = require("safetensors")
        try:
            with safetensors.safe_open(single, framework="pt") as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        except Exception as error:
            raise damaged_shard(SINGLE, error) from error
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"the checkpoint holds only pickled weights ({pickles[0]}), which can run code when they are loaded.",
            hint="Convert it with transformers: model.save_pretrained(DIR, safe_serialization=True)",
        )
    raise CheckpointError(f"'{folder.name}' holds no safetensors weights.", hint=f"{SINGLE} or {INDEX} is expected.")
