"""What a model of a repository is told in its configuration: the bundle, and what runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from holov_export.bundle import Bundle, open_bundle
from holov_export.errors import UsageError
from holov_export.policies import Frozen
from holov_export.runtime.decoder_choice import DecoderOptions, decoder_maker
from holov_export.runtime.ort_providers import decoder_provider
from holov_export.runtime.session import Session
from holov_export.serve.limits import Limits

_LIMITS = Limits()
_Settings = TypeVar("_Settings", bound="ModelSettings")


class ModelSettings(Frozen):
    """The parameters of a model, one key of config.pbtxt each; all are strings there.

    Attributes:
        bundle: its folder; a relative one begins at the model's own folder.
        method: which of its vision graphs; None for the default one.
        engine, target, provider, threads, decoder: as of `Session.open`; `verify` likewise, full when an administrator
            wants every start to read all files.
        checkpoint, decoder_folder, decoder_url, tensor_parallel: see `DecoderOptions`.
        images, pixels: of one request, and of one image, before it is decoded.
        new_tokens: longest answer. queue: answers that wait or run at once in this model.
        answers: answers that are made at once.
    """

    bundle: str
    method: str | None = None
    engine: str = "ort"
    target: str | None = None
    provider: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    verify: Literal["full", "size"] = "size"
    decoder: str = "auto"
    checkpoint: str | None = None
    decoder_folder: str | None = None
    decoder_url: str | None = None
    tensor_parallel: int = Field(default=1, ge=1)
    images: int = Field(default=_LIMITS.images, ge=1)
    pixels: int = Field(default=_LIMITS.pixels, ge=1)
    new_tokens: int = Field(default=_LIMITS.new_tokens, ge=1)
    queue: int = Field(default=_LIMITS.queue, ge=1)
    answers: int = Field(default=32, ge=1)

    def parameters(self) -> list[tuple[str, str]]:
        """(key, value) of everything that is not None."""
        values = self.model_dump(mode="json").items()
        return [(key, str(value)) for key, value in values if value is not None]

    def opened(self) -> Bundle:
        """The bundle, with the graph that `method` names.

        Raises:
            BundleError, IntegrityError, UnknownNameError: see `open_bundle`.
        """
        found = open_bundle(self.bundle, verify=self.verify)
        return found if self.method is None else found.of_method(self.method)

    def decoding_session(self, bundle: Bundle) -> Session:
        """A session without vision graphs: it stitches and answers.

        Raises:
            UsageError, BundleError: see `decoder_maker`.
        """
        return Session(bundle, None, decoder_maker(self.decoder, bundle, self.decoder_options()))

    def decoder_options(self) -> DecoderOptions:
        """What the decoder is loaded with; a server's key is in the environment, not in the repository."""
        return DecoderOptions(
            provider=decoder_provider(self.provider),
            threads=self.threads,
            checkpoint=None if self.checkpoint is None else Path(self.checkpoint),
            folder=None if self.decoder_folder is None else Path(self.decoder_folder),
            url=self.decoder_url,
            api_key=os.environ.get("HOLOV_EXPORT_DECODER_API_KEY") or None,
            tensor_parallel=self.tensor_parallel,
            verify=self.verify,
        )


def settings_from_arguments(arguments: Mapping[str, str], kind: type[_Settings]) -> _Settings:
    """Read what Triton's Python backend gives to `initialize`.

    Args:
        arguments: "model_config" is the configuration as JSON, "model_repository" the model's folder.
        kind: `ModelSettings`, or what a model has of them.

    Raises:
        UsageError: a parameter is missing, unknown or wrong.
    """
    found = json.loads(arguments["model_config"]).get("parameters", {})
    given = {key: value["string_value"] for key, value in found.items()}
    if "bundle" in given:
        given["bundle"] = str(Path(arguments.get("model_repository", "."), given["bundle"]))
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"the parameter '{'.'.join(map(str, first['loc']))}' of the model's config.pbtxt: {first['msg']}.",
            hint="Write the repository again: holov-export triton.",
        ) from error
