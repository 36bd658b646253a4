"""The whole way, against transformers: preprocess, vision graph, selection, stitching, GenAI decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TinyLlava, write_checkpoint
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from holov_export import Session
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovPolicy
from holov_export.request import ExportRequest
from holov_export.selection.reference import positions_of
from holov_export.spec import DecoderPrecision, Precision
from holov_export.tensors import SamplingSettings

PROMPTS = ("what is shown in this picture?", "how many digits are there? answer in one word.")
NEW = 24
GREEDY = SamplingSettings(max_new_tokens=NEW)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5's own 24 x 24 grid of 576 tokens, everything else tiny."""
    return write_checkpoint(tmp_path_factory.mktemp("grid24") / "tiny-576", TinyLlava(image_size=168, context=768))


@pytest.fixture(scope="module")
def session(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("bundles") / "tiny-576"
    export_bundle(ExportRequest(str(checkpoint), HolovPolicy(), Precision.FP32, DecoderPrecision.FP32, out))
    with Session.open(out, provider="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    loaded = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    loaded.set_attn_implementation("eager")
    return loaded.eval()


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint)


def inputs_of(processor: Any, image: Image.Image | list[Image.Image], question: str) -> Any:
    count = len(image) if isinstance(image, list) else 1
    content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=image, text=text, return_tensors="pt")


def without_end(ids: torch.Tensor, model: Any) -> tuple[int, ...]:
    end = model.generation_config.eos_token_id
    listed = ids.tolist()
    return tuple(listed[: listed.index(end)] if end in listed else listed)


def generated(model: Any, inputs: Any) -> tuple[int, ...]:
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return without_end(out[0, inputs["input_ids"].shape[1] :], model)


def generated_from_rows(
    model: Any, inputs: Any, images: int, quota: int, saliency_grid: tuple[int, int] = (24, 24)
) -> tuple[int, ...]:
    """transformers' own features, the rows that the reference keeps, transformers' own generate."""
    image_id = model.config.image_token_id
    layer = model.config.vision_feature_layer
    with torch.inference_mode():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        rows = model.model.multi_modal_projector(tower.hidden_states[layer][:, 1:])
        saliency = tower.attentions[layer][:, :, 0, 1:].mean(1).numpy()
        kept = [positions_of(HolovPolicy(), saliency[index], quota, saliency_grid) for index in range(images)]
        ids = inputs["input_ids"][0]
        is_image = ids == image_id
        pieces, cursor, image = [], 0, 0
        embed = model.get_input_embeddings()
        while cursor < len(ids):
            if is_image[cursor]:
                pieces.append(rows[image][torch.from_numpy(kept[image])])
                cursor += rows.shape[1]
                image += 1
            else:
                pieces.append(embed(ids[cursor : cursor + 1]))
                cursor += 1
        embeds = torch.cat(pieces)[None]
        out = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
        )
    return without_end(out[0], model)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("picture", range(4))
def test_full_budget_is_token_identical_with_transformers(
    session: Session, model: Any, processor: Any, photographs: list[Image.Image], picture: int, prompt: str
) -> None:
    image = photographs[picture]
    answer = session.ask(image, prompt, budget=576, sampling=GREEDY)
    assert answer.visual_tokens == (576,)
    assert answer.token_ids == generated(model, inputs_of(processor, image, prompt))


@pytest.mark.parametrize("budget", [192, 64, 16, 1])
@pytest.mark.parametrize("picture", range(4))
def test_pruned_budget_is_token_identical_with_transformers_fed_the_reference_rows(
    session: Session, model: Any, processor: Any, photographs: list[Image.Image], picture: int, budget: int
) -> None:
    image = photographs[picture]
    for prompt in PROMPTS:
        answer = session.ask(image, prompt, budget=budget, sampling=GREEDY)
        assert answer.visual_tokens == (budget,)
        assert answer.token_ids == generated_from_rows(model, inputs_of(processor, image, prompt), 1, budget)


def test_two_images_in_one_prompt(session: Session, model: Any, processor: Any, photographs: list[Image.Image]) -> None:
    answer = session.ask(photographs[:2], PROMPTS[0], budget=16, sampling=GREEDY)
    expected = generated_from_rows(model, inputs_of(processor, photographs[:2], PROMPTS[0]), 2, 16)
    assert answer.visual_tokens == (16, 16)
    assert answer.token_ids == expected


def test_a_batch_answers_like_single_calls(session: Session, photographs: list[Image.Image]) -> None:
    batch = session.ask_batch(photographs[:2], PROMPTS, budget=64, quota=[64, 16], sampling=GREEDY)
    singles = [
        session.ask(photographs[0], PROMPTS[0], budget=64, sampling=GREEDY),
        session.ask(photographs[1], PROMPTS[1], budget=16, sampling=GREEDY),
    ]
    assert [answer.token_ids for answer in batch] == [answer.token_ids for answer in singles]
    assert [answer.visual_tokens for answer in batch] == [(64,), (16,)]


def test_fewer_tokens_make_different_answers_than_none_would(session: Session, photographs: list[Image.Image]) -> None:
    """A guard against a decoder that ignores its rows: two pictures must not always get the same answer."""
    answers = {session.ask(image, PROMPTS[0], budget=64, sampling=GREEDY).token_ids for image in photographs}
    assert len(answers) > 1


def test_timings_add_up(session: Session, photographs: list[Image.Image]) -> None:
    times = session.ask(photographs[0], PROMPTS[0], budget=16, sampling=GREEDY).timings
    stages = (times.preprocess, times.vision, times.stitch, times.setup, times.prefill, times.decode)
    assert all(stage > 0 for stage in stages)
    assert np.isclose(times.total, sum(stages))
    assert times.ttft < times.total
