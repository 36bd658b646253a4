"""The models known by name, and how a `--model` value becomes a checkpoint directory.

A value is, in this order: a name of the table, an existing directory, or a Hugging Face repository id.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from holov_export.assets import data_folder
from holov_export.errors import CheckpointError, NetworkError, StorageError, UnknownNameError
from holov_export.extras import require
from holov_export.spec import CheckpointSource

#: files of a checkpoint that are small and always needed
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
#: OWNER/REPO as the hub takes it. Source: huggingface_hub 2.4 utils/_validators.py
_REPOSITORY = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)
#: what a disk that refuses a download says
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class CatalogEntry:
    """One model of the table.

    Attributes:
        repository: empty for the model that ships with the package.
        revision: full commit; empty where none is known, and the newest one is taken. A manifest records which it was.
        tokens: of the largest picture.
        family: as `ModelSpec.family`.
        varies: pictures have unequal numbers of tokens.
        fewest: tokens of the smallest picture, where small ones have few; None where they are scaled up.
        videos: clips are taken.
    """

    name: str
    repository: str
    revision: str
    parameters: str
    tokens: int
    note: str
    family: str = "llava"
    varies: bool = False
    fewest: int | None = None
    videos: bool = False


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry("demo", "", "", "2.3 M", 144, "ships with the package; answers about digits on photographs"),
        CatalogEntry(
            "llava-1.5-7b",
            "llava-hf/llava-1.5-7b-hf",
            "b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
            "7 B",
            576,
            "CLIP ViT-L/14-336 and Vicuna-7B v1.5",
        ),
        CatalogEntry(
            "llava-1.5-13b",
            "llava-hf/llava-1.5-13b-hf",
            "5dda2880bda009266dda7c4baff660b95ca64540",
            "13 B",
            576,
            "CLIP ViT-L/14-336 and Vicuna-13B v1.5",
        ),
        CatalogEntry(
            "llava-v1.6-vicuna-7b",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            "c916e6cdcd760b4cecd1dd4907f84ac649f93b23",
            "7 B",
            2880,
            "LLaVA-NeXT: up to 4 tiles, CLIP ViT-L/14-336 and Vicuna-7B v1.5",
            family="llava_next",
            varies=True,
        ),
        CatalogEntry(
            "llava-v1.6-vicuna-13b",
            "llava-hf/llava-v1.6-vicuna-13b-hf",
            "e66fcaaa7d502b1037c8465375bb67f4c33758dd",
            "13 B",
            2880,
            "LLaVA-NeXT: up to 4 tiles, CLIP ViT-L/14-336 and Vicuna-13B v1.5",
            family="llava_next",
            varies=True,
        ),
        CatalogEntry(
            "llava-v1.6-mistral-7b",
            "llava-hf/llava-v1.6-mistral-7b-hf",
            "52320fb52229c8d942b1dcb8b63b3dc8087bc83b",
            "7 B",
            2880,
            "LLaVA-NeXT: up to 4 tiles, CLIP ViT-L/14-336 and Mistral-7B Instruct v0.2",
            family="llava_next",
            varies=True,
        ),
        CatalogEntry(
            "qwen2.5-vl-3b",
            "Qwen/Qwen2.5-VL-3B-Instruct",
            "66285546d2b821cf421d4f5eb2576359d3770cd3",
            "3 B",
            16384,
            "any resolution, images and videos, windowed ViT and Qwen2.5-3B",
            family="qwen2_5_vl",
            varies=True,
            fewest=4,
            videos=True,
        ),
        CatalogEntry(
            "qwen2.5-vl-7b",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "cc594898137f460bfe9f0759e9844b3ce807cfb5",
            "7 B",
            16384,
            "any resolution, images and videos, windowed ViT and Qwen2.5-7B",
            family="qwen2_5_vl",
            varies=True,
            fewest=4,
            videos=True,
        ),
        CatalogEntry(
            "video-llava-7b",
            "LanguageBind/Video-LLaVA-7B-hf",
            "4cf9d8cfc76a54f46a4cb43be5368b46b7f0d736",
            "7 B",
            256,
            "images and clips of 8 frames, two CLIP ViT-L/14-224 and Vicuna-7B v1.5",
            family="video_llava",
            videos=True,
        ),
    )
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk: its directory and where it came from."""

    folder: Path
    source: CheckpointSource


@dataclass(frozen=True)
class ModelReference:
    """What a `--model` value means, before anything is fetched."""

    label: str
    kind: str
    repository: str = ""
    revision: str | None = None
    folder: Path | None = None


def reference_from_name(model: str) -> ModelReference:
    """Resolve a `--model` value without touching the network.

    Raises:
        UnknownNameError: neither a catalogue name, a directory nor a repository id.
    """
    if model in CATALOG:
        entry = CATALOG[model]
        if not entry.repository:
            return ModelReference(entry.name, "bundled", folder=data_folder("demo-model"))
        return ModelReference(entry.name, "hub", entry.repository, entry.revision or None)
    path = Path(model).expanduser()
    if model and os.path.isdir(path):  # Path("") is the working directory; its own raises for a name that is too long
        return ModelReference(path.resolve().name, "local", folder=path.resolve())
    looks_like_path = (
        path.is_absolute() or model.startswith((".", "~")) or model.endswith("/") or (model and os.path.exists(path))
    )
    if model.count("/") == 1 and not looks_like_path:
        repository, _, revision = model.partition("@")
        if not _REPOSITORY.fullmatch(repository):
            raise UnknownNameError(
                f"'{model}' is neither a directory nor a repository id.",
                hint="--model takes a name, a directory or OWNER/REPO[@REVISION].",
            )
        return ModelReference(repository.rsplit("/", 1)[-1], "hub", repository, revision or None)
    if looks_like_path or "/" in model:
        raise UnknownNameError(
            f"'{model}' is not a directory.", hint="--model takes a name, a directory or OWNER/REPO."
        )
    raise UnknownNameError(
        f"unknown model '{model}'.",
        hint=f"Known names: {', '.join(CATALOG)}. A directory or OWNER/REPO[@REVISION] works as well.",
    )


def checkpoint_from_reference(reference: ModelReference, *, weights: bool = True) -> Checkpoint:
    """The checkpoint on disk, fetched from the hub if it is not in the local cache.

    Args:
        reference: from `reference_from_name`.
        weights: False fetches only the configuration and tokenizer files.

    Raises:
        NetworkError: the hub cannot be reached and the cache has no copy.
        StorageError: the hub's cache cannot be written.
        CheckpointError: the repository or revision does not exist.
        UnknownNameError: the hub's client does not take the repository's name.
    """
    if reference.folder is not None:
        kind = "bundled" if reference.kind == "bundled" else "local"
        source = CheckpointSource(kind=kind, name=reference.label)  # type: ignore[arg-type]
        return Checkpoint(reference.folder, source)
    folder = _cached(reference, weights=weights) or _downloaded(reference, weights=weights)
    revision = folder.name if folder.parent.name == "snapshots" else reference.revision
    return Checkpoint(folder, CheckpointSource(kind="hub", name=reference.repository, revision=revision))


def _cached(reference: ModelReference, *, weights: bool) -> Path | None:
    """The hub cache's copy if it is complete. A dry run leaves one without weights, a killed download half an index."""
    hub = require("huggingface_hub")
    try:
        folder = Path(hub.snapshot_download(reference.repository, revision=reference.revision, local_files_only=True))
    except hub.errors.HFValidationError as error:
        raise UnknownNameError(f"'{reference.repository}' is not a repository id: {error}") from error
    except (hub.errors.LocalEntryNotFoundError, OSError, ValueError):
        return None
    index = folder / "model.safetensors.index.json"
    if not weights:
        return folder if (folder / "config.json").is_file() else None
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return folder if shards and all((folder / shard).is_file() for shard in shards) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
    return folder if (folder / "model.safetensors").is_file() else None


def _downloaded(reference: ModelReference, *, weights: bool) -> Path:
    hub = require("huggingface_hub")
    patterns = [*SIDE_FILES, *(WEIGHT_PATTERNS if weights else ())]
    advice = "If you have a copy, name its directory: --model DIR"
    unreachable = NetworkError(
        f"'{reference.repository}' is not in the local cache and the model hub cannot be reached.", hint=advice
    )
    if hub.constants.HF_HUB_OFFLINE or not _hub_answers(str(hub.constants.ENDPOINT)):
        raise unreachable
    try:
        return Path(hub.snapshot_download(reference.repository, revision=reference.revision, allow_patterns=patterns))
    except hub.errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"'{reference.repository}' does not exist on the hub or is private.", hint=advice
        ) from error
    except hub.errors.RevisionNotFoundError as error:
        raise CheckpointError(f"'{reference.repository}' has no revision {reference.revision}.", hint=advice) from error
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HfHubHTTPError, OSError, RuntimeError) as error:
        reason = _refusal_of_the_disk(error)
        if reason:
            raise StorageError(
                f"'{reference.repository}' cannot be downloaded: {reason}.",
                hint=f"It goes to '{hub.constants.HF_HUB_CACHE}'; HF_HOME=DIR chooses another disk.",
            ) from error
        raise unreachable from error


def _refusal_of_the_disk(error: BaseException) -> str:
    """What the operating system says if a download failed on this side; empty if it did not.

    A refusal of permission names a file; without one it comes from a firewall. hf_xet, the hub's client for large
    files, raises RuntimeError with the number in the text.
    """
    number, name = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if isinstance(error, RuntimeError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number in _DISK or (name is not None and number in (errno.EACCES, errno.EPERM)):
        return os.strerror(number or 0) + (f": '{name}'" if name is not None else "")
    return ""


def _hub_answers(endpoint: str) -> bool:
    """A look before the leap: the hub's client retries for half a minute. Behind a proxy only it can tell."""
    if getproxies().get("https"):
        return True
    parts = urlsplit(endpoint)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
