"""Prompts and their token ids against transformers' LlavaProcessor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TinyLlava, write_checkpoint
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from holov_export.errors import BundleError, PromptError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.runtime.prompt import prompt_from_question
from holov_export.runtime.stitch import PromptEncoder, prompt_encoder_from_tokenizer, stitch
from holov_export.spec import PromptSpec

QUESTIONS = [
    "what is this?",
    "how many digits are there, and which is red?",
    "  two  spaces\tand a tab\nand a line ",
    "naïve café, straße 7 + 5 = 12",
    "日本語と emoji 🦕🇫🇷",
    "</s> <s> <pad> inside",
    "{{ 7 * 7 }} {% raw %}",
]


@pytest.fixture(scope="module", params=["llama", "byte-level"])
def checkpoint(
    request: pytest.FixtureRequest, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "llama":
        return llava_checkpoint
    return write_checkpoint(tmp_path_factory.mktemp("byte-level"), TinyLlava(byte_level=True))


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> LlavaProcessor:
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> PromptEncoder:
    return prompt_encoder_from_tokenizer(checkpoint / "tokenizer.json", spec_from_checkpoint(checkpoint, "tiny"))


def conversation(question: str, images: int) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "image"}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def rows_of(counts: list[int], width: int) -> list[np.ndarray]:
    return [np.full((count, width), index, np.float32) for index, count in enumerate(counts)]


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_are_those_of_llava_processor(
    processor: LlavaProcessor, encoder: PromptEncoder, question: str, images: int
) -> None:
    text = encoder.text_from_question(question, images=images)
    assert text == processor.apply_chat_template(conversation(question, images), add_generation_prompt=True)
    pictures = [Image.new("RGB", (60, 60))] * images
    wanted = processor(images=pictures, text=text, return_tensors="np")["input_ids"][0]
    stitched = stitch(encoder, text, rows_of([64] * images, 96))
    assert stitched.input_ids.tolist() == wanted.tolist()
    assert stitched.input_ids[0] == 1, "the post-processor's BOS"
    assert stitched.text == text


def test_rows_follow_the_placeholders(encoder: PromptEncoder) -> None:
    counts = [3, 1, 5]
    stitched = stitch(encoder, "first <image> second <image> third <image>.", rows_of(counts, 96))
    assert stitched.counts == (3, 1, 5)
    assert stitched.rows[:, 0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    runs = np.flatnonzero(stitched.input_ids == 3)
    assert len(runs) == 9
    assert [len(run) for run in np.split(runs, np.flatnonzero(np.diff(runs) > 1) + 1)] == counts


def test_question_with_placeholders_puts_the_images_there(encoder: PromptEncoder, processor: LlavaProcessor) -> None:
    text = encoder.text_from_question("is <image> like <image>?", images=2)
    assert text == "USER: is <image> like <image>? ASSISTANT:"


def test_bos_in_the_text_is_not_doubled(encoder: PromptEncoder) -> None:
    ids = stitch(encoder, "<s>USER: <image>\nwhat? ASSISTANT:", rows_of([2], 96)).input_ids.tolist()
    assert ids.count(1) == 1


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        ("is <image> like <image>?", 1, "2 placeholders and 1 image"),
        ("what is <image>?", 2, "1 placeholder and 2 images"),
        ("", 1, "question is empty"),
        (" \n", 1, "question is empty"),
        ("<image>", 1, "question is empty"),
    ],
)
def test_questions_that_are_refused(encoder: PromptEncoder, question: str, images: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        encoder.text_from_question(question, images=images)


@pytest.mark.parametrize(
    ("text", "counts", "message"),
    [
        ("USER: what? ASSISTANT:", [4], "no placeholder for 1 image"),
        ("<image><image>", [4], "2 placeholders and 1 image"),
        ("<image> what", [4, 4], "1 placeholder and 2 images"),
        ("  ", [], "prompt is empty"),
    ],
)
def test_prompts_that_are_refused(encoder: PromptEncoder, text: str, counts: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        stitch(encoder, text, rows_of(counts, 96))


def test_prompt_past_the_context_names_the_numbers(encoder: PromptEncoder) -> None:
    length = len(stitch(encoder, "<image> what?", rows_of([64], 96)))
    stitch(encoder, "<image> what?", rows_of([64], 96), max_new_tokens=512 - length)
    message = rf"has {length} tokens \(64 of them visual\).*context of 512.*at most {512 - length}"
    with pytest.raises(PromptError, match=message):
        stitch(encoder, "<image> what?", rows_of([64], 96), max_new_tokens=513 - length)
    with pytest.raises(PromptError, match="Shorten the prompt"):
        stitch(encoder, "<image>" * 8, rows_of([64] * 8, 96), max_new_tokens=1)


def test_rows_of_another_width(encoder: PromptEncoder) -> None:
    with pytest.raises(PromptError, match="rows of width 96"):
        stitch(encoder, "<image> what?", rows_of([4], 95))


def test_truncation_in_the_tokenizer_file_is_ignored(checkpoint: Path, encoder: PromptEncoder, tmp_path: Path) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    cut = prompt_encoder_from_tokenizer(tmp_path / "tokenizer.json", spec_from_checkpoint(checkpoint, "tiny"))
    assert cut.ids_from_text("a longer question?") == encoder.ids_from_text("a longer question?")


def test_broken_tokenizer_file(tmp_path: Path, checkpoint: Path) -> None:
    model = spec_from_checkpoint(checkpoint, "tiny")
    with pytest.raises(BundleError, match=r"tokenizer\.json does not load"):
        prompt_encoder_from_tokenizer(tmp_path / "tokenizer.json", model)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json does not load"):
        prompt_encoder_from_tokenizer(tmp_path / "tokenizer.json", model)


# ----------------------------------------------------------------------------------------------------- templates


def test_template_that_takes_strings() -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{% endfor %}"
    spec = PromptSpec(chat_template=template)
    tokens = {"bos_token": "<s>"}
    text = prompt_from_question("what?", spec, images=2, special_tokens=tokens)
    assert text == "<s>[user] <image>\n<image>\nwhat?"


def test_template_environment_is_that_of_transformers() -> None:
    template = (
        "{% for m in messages %}\n"
        "    {% if m['role'] == 'system' %}{% continue %}{% endif %}\n"
        "    {% for c in m['content'] %}\n"
        "        {% if c['type'] == 'image' %}{% generation %}<image>{% endgeneration %}{% endif %}\n"
        "    {% endfor %}\n"
        "{{ m['content'][-1] | tojson }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    text = prompt_from_question("<b> & 'ä'?", PromptSpec(chat_template=template))
    assert text == '<image>{"type": "text", "text": "<b> & \'ä\'?"}\nA:'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{% for m in messages %}",
        "{{ messages.append(1) }}<image>",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}<image>",
        "{{ missing.attribute }}",
    ],
)
def test_templates_that_fail(template: str) -> None:
    with pytest.raises(PromptError, match="chat template failed"):
        prompt_from_question("what?", PromptSpec(chat_template=template))


def test_template_without_a_place_for_images() -> None:
    with pytest.raises(PromptError, match="no placeholder for 1 image"):
        prompt_from_question("what?", PromptSpec(chat_template="USER: hello"))
