"""The whole way on a really exported graph: with every token kept, the answer is that of LLaVA itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from holov_export.bundle import Bundle
from holov_export.runtime.decoder_genai import GenaiDecoder
from holov_export.runtime.session import Session
from holov_export.spec import ModelSpec
from holov_export.tensors import SamplingSettings

SHORT = SamplingSettings(max_new_tokens=24)
QUESTIONS = ("what is this?", "how many digits are there, and which is red?")


@pytest.fixture(scope="module")
def session(exported_bundle: Bundle, genai_folder: Path, llava_spec: ModelSpec) -> Iterator[Session]:
    decoder = GenaiDecoder(genai_folder, llava_spec.decoder, provider="cpu", threads=1)
    with Session.open(exported_bundle, decoder=decoder, provider="cpu", threads=1) as opened:
        yield opened


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("question", QUESTIONS)
def test_all_tokens_kept_is_llava_itself(
    session: Session, llava_checkpoint: Path, photographs: list[Image.Image], question: str, images: int
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava_checkpoint).eval()
    processor = AutoProcessor.from_pretrained(llava_checkpoint)
    pictures = photographs[:images]
    parts = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = session.ask(pictures, question, budget=64, sampling=SHORT)
    assert list(answer.token_ids) == [token for token in out[0, inputs["input_ids"].shape[1] :].tolist() if token != 2]
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.visual_tokens == (64,) * images


def test_fewer_tokens_make_a_shorter_prompt(session: Session, photographs: list[Image.Image]) -> None:
    lengths = {}
    for budget in (64, 16, 7, 1):
        answer = session.ask(photographs[0], QUESTIONS[0], budget=budget, sampling=SHORT)
        assert answer.visual_tokens == (budget,)
        lengths[budget] = answer.prompt_tokens
    assert lengths[64] - lengths[7] == 57


def test_quotas_of_a_batch_equal_single_pictures(session: Session, photographs: list[Image.Image]) -> None:
    quotas = [16, 9, 4, 1]
    batch = session.ask_batch(photographs, ["what is this?"] * 4, budget=16, quota=quotas, sampling=SHORT)
    for image, quota, answer in zip(photographs, quotas, batch, strict=True):
        assert session.ask(image, "what is this?", budget=quota, sampling=SHORT).token_ids == answer.token_ids
