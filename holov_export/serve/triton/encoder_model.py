"""`multimodal_encoders` of TensorRT-LLM's Triton backend, with fewer rows: same names, same types, K rows for an image.

Not run in a TensorRT-LLM container. The names, types and shapes are those of LLaVA there.
Source: NVIDIA/TensorRT-LLM triton_backend/all_models/multimodal/multimodal_encoders/config.pbtxt@4942c91 and
1/model.py@5482176; inflight_batcher_llm/preprocessing/1/model.py@01259b1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from holov_export.bundle import Bundle
from holov_export.errors import EngineError, ImageError, UnsupportedModelError, UsageError
from holov_export.runtime.runner import checked_budget
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.serve.triton.bridge import Bridge
from holov_export.serve.triton.config_text import Batching, ModelConfig, TensorConfig
from holov_export.serve.triton.settings import ModelSettings, settings_from_arguments
from holov_export.spec import ImageSpec
from holov_export.tensors import CropBox, PixelBatch, VisualTokens

NAME = "multimodal_encoders"
TABLE = "OUT_PROMPT_EMBEDDING_TABLE"
TABLE_ROWS = "OUT_PROMPT_VOCAB_SIZE"
PIXELS = ("pixel_values", "IMAGE")
#: what preprocessing and this model read of the folder `multimodal_model_path`
VISUAL_CONFIG = "config.json"
_ANY = -1

#: in the order of the source; an ensemble maps all of them, so all of them must exist
INPUTS = (
    TensorConfig("IMAGE", "float16", (_ANY,) * 4, optional=True),
    TensorConfig("pixel_values", "float16", (_ANY,) * 4, optional=True),
    TensorConfig("aspect_ratio_ids", "int64", (_ANY,), optional=True),
    TensorConfig("aspect_ratio_mask", "int64", (_ANY,) * 2, optional=True),
    TensorConfig("cross_attention_mask", "int64", (_ANY,) * 3, optional=True),
    TensorConfig("max_tokens", "int32", (1,), optional=True),
    TensorConfig("image_sizes", "int64", (2,), optional=True),
    TensorConfig("is_video_input", "bool", (1,), optional=True),
    TensorConfig("attention_mask", "int64", (_ANY,), optional=True),
    TensorConfig("image_grid_thw", "int64", (3,), optional=True),
    TensorConfig("vision_input_id", "int32", (_ANY,), optional=True),
)
OUTPUTS = (
    TensorConfig(TABLE, "float16", (_ANY,) * 2),
    TensorConfig(TABLE_ROWS, "int32", (1,)),
    TensorConfig("ENCODER_INPUT_FEATURES", "float16", (_ANY,) * 2),
    TensorConfig("ENCODER_OUTPUT_LENGTHS", "int32", (1,), reshaped=()),
    TensorConfig("CROSS_ATTENTION_MASK", "bool", (_ANY,) * 2),
    TensorConfig("SKIP_CROSS_ATTN_BLOCKS", "bool", (1,)),
    TensorConfig("MROPE_ROTARY_COS_SIN", "float32", (_ANY,)),
    TensorConfig("MROPE_POSITION_DELTAS", "int64", (1,)),
)


class EncoderSettings(ModelSettings):
    """The parameters of this model.

    Attributes:
        budget: K. Preprocessing makes so many ids of each image, for all requests alike, so it is fixed here.
        gpt_model_path: folder of the language model's engine, as preprocessing has it; None or "" to believe `budget`.
        max_num_images: as preprocessing has it.
    """

    budget: int = Field(ge=1)
    gpt_model_path: str | None = None
    max_num_images: int | None = Field(default=None, ge=1)


def check_encodable(bundle: Bundle) -> None:
    """Refuse a model that this layout has no place for.

    Raises:
        UnsupportedModelError: its pictures have unequal numbers of tokens, or its positions are three numbers.
    """
    plan = bundle.manifest.plan
    if plan.packed or not isinstance(plan.model.image, ImageSpec) or plan.start_counts:
        raise UnsupportedModelError(
            f"'{plan.model.name}' does not fit the layout multimodal_ifb: its preprocessing makes as many ids "
            "for one picture as for another, as LLaVA-1.5 has it.",
            hint="Use --layout holov.",
        )


def encoder_config(bundle: Bundle, settings: EncoderSettings, *, batch: int, gpu: bool) -> ModelConfig:
    """Its configuration; `triton_max_batch_size` and `max_queue_delay_microseconds` of the source are filled in.

    Raises:
        UnsupportedModelError, BudgetError: see `check_encodable`, `checked_budget`.
    """
    check_encodable(bundle)
    checked_budget(settings.budget, bundle.manifest.plan.tokens)
    return ModelConfig(
        name=NAME,
        backend="python",
        inputs=INPUTS,
        outputs=OUTPUTS,
        batching=Batching(largest=batch, delay_microseconds=5000, queue=settings.queue),
        device="gpu" if gpu else "cpu",
        parameters=settings.parameters(),
    )


def visual_config_text() -> str:
    """config.json for the `multimodal_model_path` of preprocessing, which wants to know the model type."""
    return json.dumps({"builder_config": {"model_type": "llava", "precision": "float16"}}, indent=2) + "\n"


def ids_of_engine(build: Mapping[str, Any], max_num_images: int | None) -> int:
    """How many ids preprocessing makes of each image, by the engine's own config.json.

    Source: `_setup_ptable_shape` of preprocessing/1/model.py@01259b1.

    Raises:
        EngineError: the configuration has no such numbers.
    """
    try:
        sizes = build["build_config"]
        features = int(sizes["max_prompt_embedding_table_size"]) // int(sizes["max_batch_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the engine's config.json has no size of the prompt table: {error!r}.") from error
    return features if max_num_images is None else features // max_num_images


def check_language_engine(settings: EncoderSettings) -> None:
    """Refuse to start where preprocessing would make another number of ids than this model gives rows.

    Raises:
        EngineError: names both numbers and the option that changes them.
    """
    if not settings.gpt_model_path:
        return
    path = Path(settings.gpt_model_path) / "config.json"
    try:
        build = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"'{path}' does not load: {error}.") from error
    ids = ids_of_engine(build, settings.max_num_images)
    if ids != settings.budget:
        raise EngineError(
            f"preprocessing makes {ids} ids for each image, the number that the engine was built for; this model gives "
            f"{settings.budget} rows.",
            hint="Build the engine with --max_multimodal_len BUDGET x IMAGES x MAX_BATCH_SIZE, or set the parameter "
            f"'budget' to {ids}.",
        )


class EncoderModel:
    """What Triton's Python backend calls."""

    def initialize(self, arguments: Mapping[str, str]) -> None:
        """Open the bundle and load the graph."""
        self._bridge = Bridge(strings=False)
        self._settings = settings_from_arguments(arguments, EncoderSettings)
        check_language_engine(self._settings)
        bundle = self._settings.opened()
        check_encodable(bundle)
        self._size = bundle.manifest.plan.model.clip.image_size
        self._budget = checked_budget(self._settings.budget, bundle.manifest.plan.tokens)
        self._runner = runner_from_bundle(
            bundle,
            engine=self._settings.engine,
            target=self._settings.target,
            provider=self._settings.provider,
            threads=self._settings.threads,
            verify=self._settings.verify,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request; all images of all requests in one run."""
        pixels: dict[int, npt.NDArray[Any]] = {}
        responses: dict[int, Any] = {}
        for number, request in enumerate(requests):
            try:
                pixels[number] = self._pixels(request)
            except Exception as error:
                responses[number] = self._bridge.failure(error)
        try:
            responses.update(self._encoded(pixels))
        except Exception as error:
            responses.update({number: self._bridge.failure(error) for number in pixels})
        return [responses[number] for number in range(len(requests))]

    def finalize(self) -> None:
        """Release the graph."""
        self._runner.close()

    def _pixels(self, request: Any) -> npt.NDArray[Any]:
        """[batch, images, 3, H, W] of a request.

        Raises:
            ImageError: it has none, or of another size.
        """
        given = (self._bridge.input(request, name) for name in PIXELS)
        found = next((array for array in given if array is not None), None)
        if found is None:
            raise ImageError("there is no preprocessed image: the request has neither pixel_values nor IMAGE.")
        wanted = (3, self._size, self._size)
        if found.ndim != 5 or found.shape[2:] != wanted or found.size == 0:
            raise ImageError(f"the pixels have the shape {list(found.shape)}, expected [batch, images, 3, H, W] with "
                             f"H = W = {self._size}.")  # fmt: skip
        return found

    def _encoded(self, pixels: Mapping[int, npt.NDArray[Any]]) -> dict[int, Any]:
        if not pixels:
            return {}
        flat = np.concatenate([array.reshape(-1, *array.shape[2:]) for array in pixels.values()])
        visual = self._seen(flat.astype(np.float32))
        responses, first = {}, 0
        for number, array in pixels.items():
            batch, images = array.shape[:2]
            tokens = visual.tokens[first : first + batch * images]
            first += batch * images
            table = tokens.reshape(batch, images * self._budget, -1).astype(np.float16)
            rows = np.full((batch, 1), images * self._budget, dtype=np.int32)
            responses[number] = self._bridge.response(
                [self._bridge.tensor(TABLE, table), self._bridge.tensor(TABLE_ROWS, rows)]
            )
        return responses

    def _seen(self, pixels: npt.NDArray[np.float32]) -> VisualTokens:
        count, size = len(pixels), self._size
        boxes = (CropBox(0, 0, size, size),) * count  # of no interest: nobody asks where the tokens are
        visual = self._runner.run(PixelBatch(pixels, boxes, ((size, size),) * count), self._budget, saliency=False)
        fewest = int(visual.counts.min())
        if fewest != self._budget:
            raise UsageError(f"an image has only {fewest} rows, preprocessing made {self._budget} ids.")
        return visual
