"""The side files of a checkpoint directory: JSON, the settings of its processors, its template and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from holov_export.errors import CheckpointError


def read_json(folder: Path, file: str) -> dict[str, Any]:
    """A JSON object of the checkpoint.

    Raises:
        CheckpointError: missing or not a JSON object.
    """
    path = folder / file
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"the checkpoint has no {file}.", hint="A Hugging Face model directory is expected."
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} of the checkpoint does not parse ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} of the checkpoint is not a JSON object.")
    return value


def image_settings(folder: Path) -> dict[str, Any]:
    """What the files say of the image processor, `null` left out: in processor_config.json, or a file of its own.

    Raises:
        CheckpointError: there is neither, or it does not parse.
    """
    found = _nested(folder, "image_processor")
    return _given(read_json(folder, "preprocessor_config.json") if found is None else found)


def video_settings(folder: Path) -> dict[str, Any] | None:
    """What the files say of the video processor, `null` left out; None if they say nothing."""
    found = _nested(folder, "video_processor")
    if found is None and (folder / "video_preprocessor_config.json").is_file():
        found = read_json(folder, "video_preprocessor_config.json")
    return None if found is None else _given(found)


def _nested(folder: Path, name: str) -> dict[str, Any] | None:
    if not (folder / "processor_config.json").is_file():
        return None
    found = read_json(folder, "processor_config.json").get(name)
    return found if isinstance(found, dict) else None


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def chat_template(folder: Path, published: str) -> str:
    """The checkpoint's own chat template, or else the one that its family is published with."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            template = read_json(folder, file).get("chat_template")
            if isinstance(template, str):
                return template
    return published


def special_token(folder: Path, token_id: int, kind: str) -> str:
    """The text of a placeholder, from the tokenizer: it must be one special token with the configured id.

    Raises:
        CheckpointError: tokenizer.json is missing, does not parse or has no such token.
    """
    for token in read_json(folder, "tokenizer.json").get("added_tokens", []):
        if token["id"] == token_id:
            return str(token["content"])
    raise CheckpointError(f"tokenizer.json has no special token with the {kind} token's id {token_id}.")
