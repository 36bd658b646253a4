"""`holov-export triton`: a model repository, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from holov_export import __version__
from holov_export.bundle import Bundle
from holov_export.errors import BundleError, UnknownNameError, UsageError
from holov_export.policies import Frozen
from holov_export.runtime.decoder_choice import decoder_maker
from holov_export.runtime.runner import default_budget
from holov_export.serve.triton import (
    answer_model,
    decoder_model,
    encoder_model,
    graph_models,
    prompt_model,
    vision_model,
)
from holov_export.serve.triton.config_text import ModelConfig, text_from_config
from holov_export.serve.triton.encoder_model import EncoderSettings
from holov_export.serve.triton.settings import ModelSettings
from holov_export.storage import FolderKind, atomic_folder

SCHEMA = 1
#: beside the models; Triton looks at folders only
MARKER = "holov_repository.json"
KIND = FolderKind(marker=MARKER, noun="model repository")
#: of a bundle that was copied, below the first model's folder, where Triton looks for numbers only
COPIED = "bundle"
#: answers without streaming are made by so many processes, each of which waits for one
ONCE_INSTANCES = 4

Layout = Literal["holov", "multimodal_ifb", "onnxruntime", "tensorrt"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_MODEL = '''"""{name}, written by holov-export {version}. The code is in the package, for the Python of Triton's stub.

SITE: the site-packages that hold the package and numpy, where the stub does not find them by itself (those for Python
3.11 and 3.12 ignore PYTHONPATH). The variable HOLOV_EXPORT_SITE comes first.
"""

import os
import site
import sys

SITE = os.environ.get("HOLOV_EXPORT_SITE") or {site!r}
if SITE:
    known = list(sys.path)
    site.addsitedir(SITE)
    # before what this Python has installed itself, which may be another numpy
    first = next((place for place, path in enumerate(known) if path.endswith("-packages")), len(known))
    sys.path[:] = [*known[:first], *(path for path in sys.path if path not in known), *known[first:]]

from {module} import {kind} as TritonPythonModel  # noqa: E402, F401
'''


class RepositoryRecord(Frozen):
    """holov_repository.json: what a finished repository is."""

    schema_version: int = SCHEMA
    tool: str
    layout: Layout
    bundle: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class RepositoryRequest:
    """What a repository is wanted for.

    Attributes:
        settings: of all models; the bundle in it is overwritten.
        layout: "holov" answers questions, "multimodal_ifb" is the encoder of TensorRT-LLM's pipeline, the others are
            the graph alone in Triton's own back end.
        batch: requests that the vision model sees at once. instances: of the vision model.
        gpu: instances are on the first GPU.
        site: where the Python of the stub finds this package; None if it does so by itself.
        copy_bundle: the bundle goes into the repository instead of being named by its path.
        budget: "multimodal_ifb": rows of every image; None for the bundle's usual number.
        gpt_model_path, max_num_images: "multimodal_ifb": see `EncoderSettings`.
        overwrite: replace a repository of ours.
    """

    settings: ModelSettings
    layout: Layout = "holov"
    batch: int = 8
    instances: int = 1
    gpu: bool = False
    site: Path | None = None
    copy_bundle: bool = False
    budget: int | None = None
    gpt_model_path: str | None = None
    max_num_images: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class PythonModel:
    """A model whose code is a class of this package."""

    config: ModelConfig
    kind: type


def write_repository(bundle: Bundle, request: RepositoryRequest, output: Path) -> RepositoryRecord:
    """Write the models of a layout into `output`.

    Raises:
        BundleError: `output` exists and is no repository of ours, or `overwrite` is False; or the bundle cannot answer.
        UsageError: the request contradicts itself or the model does not fit the layout.
        StorageError: see `storage.atomic_folder`.
    """
    _check(bundle, request)
    with atomic_folder(output, KIND, overwrite=request.overwrite) as work:
        if request.layout in ("onnxruntime", "tensorrt"):
            names = [_write_graph(bundle, request, work)]
        else:
            names = _write_python(bundle, request, work)
        record = RepositoryRecord(
            tool=f"holov-export {__version__}",
            layout=request.layout,
            bundle=bundle.folder.name,
            models=tuple(names),
        )
        (work / MARKER).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def _check(bundle: Bundle, request: RepositoryRequest) -> None:
    if request.layout not in LAYOUTS:
        raise UnknownNameError(f"unknown layout '{request.layout}'.", hint=f"Known: {', '.join(LAYOUTS)}.")
    only_ifb = (("budget", request.budget), ("gpt_model_path", request.gpt_model_path),
                ("max_num_images", request.max_num_images))  # fmt: skip
    for name, value in only_ifb:
        if value is not None and request.layout != "multimodal_ifb":
            raise UsageError(f"'{name}' is for the layout multimodal_ifb: elsewhere each request says its own.")
    if request.layout in ("onnxruntime", "tensorrt") and (request.copy_bundle or request.site):
        raise UsageError(f"the layout {request.layout} holds the graph itself and no Python.")
    if request.layout == "holov":
        settings = request.settings
        decoder_maker(settings.decoder, bundle, settings.decoder_options())
        if settings.decoder == "none":
            raise UsageError("a server without a decoder does not answer.", hint="Choose --decoder auto.")
        if settings.decoder in ("auto", "genai", "ort") and bundle.decoder is None:
            raise BundleError(
                f"the bundle '{bundle.folder.name}' was exported without a decoder.",
                hint="Export it again without --no-decoder, or choose another --decoder.",
            )


def _write_python(bundle: Bundle, request: RepositoryRequest, work: Path) -> list[str]:
    models = list(_python_models(bundle, request))
    for model in models:
        version = _version_folder(work, model.config)
        text = _MODEL.format(
            name=model.config.name,
            version=__version__,
            site=None if request.site is None else str(request.site.absolute()),
            module=model.kind.__module__,
            kind=model.kind.__name__,
        )
        (version / "model.py").write_text(text, encoding="utf-8")
    first = models[0].config.name
    if request.layout == "multimodal_ifb":
        visual = work / first / "visual_engine"
        visual.mkdir()
        (visual / encoder_model.VISUAL_CONFIG).write_text(encoder_model.visual_config_text(), encoding="utf-8")
    if request.copy_bundle:
        shutil.copytree(bundle.folder, work / first / COPIED)
    return [model.config.name for model in models]


def _python_models(bundle: Bundle, request: RepositoryRequest) -> Iterable[PythonModel]:
    """The models of a layout; the first one's folder holds the bundle if it is copied."""
    first = encoder_model.NAME if request.layout == "multimodal_ifb" else vision_model.NAME
    place = f"../{first}/{COPIED}" if request.copy_bundle else str(bundle.folder.resolve())
    settings = request.settings.model_copy(update={"bundle": place})
    if request.layout == "multimodal_ifb":
        of_encoder = EncoderSettings(
            **settings.model_dump(),
            budget=request.budget or default_budget(bundle.manifest.plan),
            gpt_model_path=request.gpt_model_path,
            max_num_images=request.max_num_images,
        )
        config = encoder_model.encoder_config(bundle, of_encoder, batch=request.batch, gpu=request.gpu)
        return [PythonModel(config, encoder_model.EncoderModel)]
    vision = vision_model.vision_config(
        bundle, settings, batch=request.batch, instances=request.instances, gpu=request.gpu
    )
    return [
        PythonModel(vision, vision_model.VisionModel),
        PythonModel(prompt_model.prompt_config(bundle, settings), prompt_model.PromptModel),
        PythonModel(decoder_model.decoder_config(bundle, settings, gpu=request.gpu), decoder_model.DecoderModel),
        PythonModel(answer_model.answer_config(settings, streamed=True), answer_model.AnswerModel),
        PythonModel(
            answer_model.answer_config(settings, streamed=False, instances=ONCE_INSTANCES),
            answer_model.AnswerOnceModel,
        ),
    ]


def _write_graph(bundle: Bundle, request: RepositoryRequest, work: Path) -> str:
    backend: Literal["onnxruntime", "tensorrt"] = "tensorrt" if request.layout == "tensorrt" else "onnxruntime"
    config = graph_models.graph_config(bundle, backend, instances=request.instances, gpu=request.gpu)
    engine = graph_models.chosen_engine(bundle, request.settings.target) if backend == "tensorrt" else None
    version = _version_folder(work, config)
    if engine is None:
        graph_models.copy_graph(bundle, version)
    else:
        shutil.copyfile(engine.plan, version / str(config.file))
    return config.name


def _version_folder(work: Path, config: ModelConfig) -> Path:
    """The folder of a model's version 1, beside its configuration."""
    version = work / config.name / "1"
    version.mkdir(parents=True)
    text = text_from_config(config, f"Written by holov-export {__version__}.")
    (work / config.name / "config.pbtxt").write_text(text, encoding="utf-8")
    return version
