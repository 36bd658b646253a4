"""Prompts of images and videos against transformers' processors; newlines; the word before a picture; mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from decoder_families import clip, encoder_of, few, oracle_of, picture, scene, spec_of
from layouts import grid_layout, layout_of, tiles_layout

from holov_export.errors import PromptError
from holov_export.runtime.prompt import prompt_from_question
from holov_export.runtime.stitch import check_fit, stitch
from holov_export.spec import PromptSpec
from holov_export.tensors import CropBox, ImageRows, Region

QWEN, NEXT, VIDEO = "qwen2_5_vl", "llava_next", "video_llava"
QUESTIONS = ["what is shown?", "  two  spaces\nand a line ", "naïve café 7 + 5 = 12", "日本語 🦕", "{{ 7 * 7 }}"]
WIDTH = 128


def rows_of(count: int, value: float = 0.0, width: int = WIDTH) -> np.ndarray:
    """float32 [count, width]: each row says which it is."""
    return (value + np.arange(count, dtype=np.float32))[:, None].repeat(width, 1)


def image(rows: int, columns: int, value: float = 0.0) -> ImageRows:
    layout = grid_layout(rows, columns)
    return ImageRows(rows_of(layout.tokens, value), np.arange(layout.tokens, dtype=np.int64), layout)


def runs(ids: np.ndarray, token: int) -> list[int]:
    """Lengths of the runs of a token."""
    places = np.flatnonzero(ids == token)
    return [len(run) for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(run)]


# ------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("name", [QWEN, NEXT, "llava_next_mistral", VIDEO])
@pytest.mark.parametrize("question", QUESTIONS)
def test_text_is_that_of_transformers(name: str, question: str) -> None:
    numbers = [(0, 0), (1, 0), (2, 0)]
    if spec_of(name).video.kind != "none":
        numbers += [(0, 1), (1, 1), (2, 2)]
    for images, videos in numbers:
        text = encoder_of(name).text_from_question(question, images=images, videos=videos)
        assert text == oracle_of(name).text(question, images, videos)


@pytest.mark.parametrize(
    ("name", "images", "videos"),
    [
        (QWEN, [(200, 120)], []),
        (QWEN, [(200, 120), (90, 260)], [(5, 90, 60)]),
        (VIDEO, [(80, 60), (60, 60)], [(8, 60, 60)]),
        ("llava_next_mistral", [(150, 40), (60, 200)], []),
    ],
)
@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_are_those_of_the_processor(
    name: str, images: list[tuple[int, int]], videos: list[tuple[int, int, int]], question: str
) -> None:
    pictures = [picture(*size, seed=index) for index, size in enumerate(images)]
    asked = scene(name, pictures, [clip(*shape) for shape in videos], words=question)
    wanted = asked.asked.inputs["input_ids"][0].numpy()
    decoder = spec_of(name).decoder
    wanted = np.where(wanted == decoder.video_token_id, decoder.image_token_id, wanted)
    np.testing.assert_array_equal(asked.stitched().input_ids, wanted)


def test_placeholders_in_a_question_get_the_words_around_them() -> None:
    """Qwen's template puts <|vision_start|> and <|vision_end|> around the pictures that it places itself."""
    encoder = encoder_of(QWEN)
    whole = "<|vision_start|><|image_pad|><|vision_end|>"
    for question in ("is <|image_pad|> like <|image_pad|>?", f"is {whole} like <|image_pad|>?"):
        text = encoder.text_from_question(question, images=2)
        assert f"user\nis {whole} like {whole}?<|im_end|>" in text
    text = encoder.text_from_question("<|video_pad|> after <|image_pad|>", images=1, videos=1)
    assert f"user\n<|vision_start|><|video_pad|><|vision_end|> after {whole}<|im_end|>" in text
    text = encoder.text_from_question("what follows <|video_pad|>?", images=1, videos=1)
    assert f"user\n{whole}what follows <|vision_start|><|video_pad|><|vision_end|>?" in text


def test_placeholders_in_a_question_stay_as_they_are_where_the_template_moves_them() -> None:
    text = encoder_of(VIDEO).text_from_question("is <image> in <video>?", images=1, videos=1)
    assert text == "USER: is <image> in <video>? ASSISTANT:"
    text = encoder_of("llava_next_mistral").text_from_question("is <image> old?", images=1)
    assert text == "[INST] is <image> old? [/INST]"


def test_template_that_takes_strings() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{% endfor %}"
    spec = PromptSpec(chat_template=template, video_placeholder="<video>")
    text = prompt_from_question("what?", spec, images=1, videos=2)
    assert text == "user: <image>\n<video>\n<video>\nwhat?"
    assert prompt_from_question("in <video>?", spec, images=1, videos=1) == "user: <image>\nin <video>?"


# ------------------------------------------------------------------------------------------------------- the order


def test_images_and_videos_go_to_their_own_placeholders() -> None:
    encoder = encoder_of(VIDEO)
    width = spec_of(VIDEO).decoder.width
    images = [rows_of(2, 100, width), rows_of(3, 200, width)]
    videos = [ImageRows(rows_of(4, 300, width), np.arange(4)), ImageRows(rows_of(5, 400, width), np.arange(5))]
    prompt = stitch(encoder, "<video> a <image> b <image> c <video>", images, videos)
    assert prompt.counts == (4, 2, 3, 5)
    firsts = [300, 301, 302, 303, 100, 101, 200, 201, 202, 400, 401, 402, 403, 404]
    assert prompt.rows[:, 0].tolist() == firsts
    assert runs(prompt.input_ids, prompt.image_token_id) == [4, 2, 3, 5]
    assert spec_of(VIDEO).decoder.video_token_id not in prompt.input_ids
    assert prompt.position_ids is None


def test_text_alone_has_positions_where_the_model_needs_them() -> None:
    prompt = stitch(encoder_of(QWEN), "hello", [])
    np.testing.assert_array_equal(prompt.position_ids, np.tile(np.arange(len(prompt)), (3, 1)))
    assert prompt.next_position == len(prompt)


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ("<|image_pad|>", 0, 1, r"has 1 <\|image_pad\|> and 0 <\|video_pad\|>, and it comes with 0 images and 1 video"),
        ("<|video_pad|>", 1, 0, r"has 0 <\|image_pad\|> and 1 <\|video_pad\|>, and it comes with 1 image and 0 videos"),
        ("<|video_pad|><|image_pad|>", 2, 1, r"has 1 <\|image_pad\|> and 1 <.*comes with 2 images and 1 video\."),
        ("<|video_pad|><|image_pad|><|image_pad|>", 1, 1, r"has 2 <\|image_pad\|> and 1 <.*with 1 image and 1 video"),
        ("what?", 0, 1, "no placeholder for 1 video"),
        ("what?", 2, 0, "no placeholder for 2 images"),
        ("<|video_pad|>", 0, 2, "has 1 placeholder and 2 videos"),
        ("<|video_pad|> <|video_pad|>", 0, 1, "has 2 placeholders and 1 video"),
        ("<|image_pad|>", 0, 0, "has 1 placeholder and 0 images"),
        ("<|video_pad|>", 0, 0, "has 1 placeholder and 0 videos"),
    ],
)
def test_mixed_up_placeholders(text: str, images: int, videos: int, message: str) -> None:
    items = [image(2, 2)] * 2
    for call in (
        lambda: stitch(encoder_of(QWEN), text, items[:images], items[:videos]),
        lambda: check_fit(encoder_of(QWEN), text, images=images, videos=videos),
    ):
        with pytest.raises(PromptError, match=message) as caught:
            call()
        assert "<|image_pad|>" in caught.value.hint or "<|video_pad|>" in caught.value.hint


def test_questions_with_mixed_up_placeholders() -> None:
    encoder = encoder_of(QWEN)
    with pytest.raises(PromptError, match=r"has 1 <.image_pad.> and 0 <.video_pad.>.*0 images and 1 video"):
        encoder.text_from_question("what is <|image_pad|>?", images=0, videos=1)
    with pytest.raises(PromptError, match="question is empty"):
        encoder.text_from_question("<|image_pad|> <|video_pad|>", images=1, videos=1)


def test_videos_for_a_model_that_takes_none() -> None:
    items = [ImageRows(rows_of(2), np.arange(2))]
    with pytest.raises(PromptError, match="comes with 1 video, and this model takes none") as caught:
        stitch(encoder_of(NEXT), "<image> what?", [], items)
    assert "single frames" in caught.value.hint
    with pytest.raises(PromptError, match="comes with 2 videos, and this model takes none"):
        encoder_of(NEXT).text_from_question("what?", images=0, videos=2)


# -------------------------------------------------------------------------------------------------------- newlines


@pytest.mark.parametrize("size", [(90, 70), (56, 56), (200, 40), (30, 170), (112, 112), (300, 260)])
def test_newlines_at_the_full_budget_are_those_of_transformers(size: tuple[int, int]) -> None:
    asked = scene(NEXT, [picture(*size)])
    assert len(asked.newlines[0]) > 0
    prompt = asked.stitched()
    embeds = oracle_of(NEXT)._whole(asked.asked.inputs)[0][0].numpy()
    np.testing.assert_array_equal(prompt.rows, embeds[asked.asked.images[0]])
    assert prompt.counts == (len(asked.asked.images[0]),)


def test_each_row_that_keeps_a_token_keeps_its_newline() -> None:
    layout = tiles_layout((2, 3), (4, 5))
    newline = np.full(WIDTH, -7.0, np.float64)
    kept = [1, 5, 6, 8, 17, 25]
    everything = ImageRows(rows_of(26), np.arange(26), layout)
    prompt = stitch(encoder_of(NEXT), "<image> what?", [few(everything, kept)], newline=newline)
    assert prompt.rows[:, 0].tolist() == [1, 5, 6, 8, -7, 17, -7, 25, -7]
    assert prompt.counts == (9,)
    assert runs(prompt.input_ids, prompt.image_token_id) == [9]
    assert prompt.rows.dtype == np.float32
    plain = stitch(encoder_of(NEXT), "<image> what?", [few(everything, kept)])
    assert plain.rows[:, 0].tolist() == kept
    base = stitch(encoder_of(NEXT), "<image> what?", [few(everything, [0, 5])], newline=newline)
    assert base.rows[:, 0].tolist() == [0, 5], "the whole picture has none"


def test_newlines_of_two_regions_with_newlines_and_of_two_images() -> None:
    box = CropBox(0, 0, 1, 1)
    layout = layout_of([Region((1, 3), box, newlines=True), Region((2, 2), box), Region((1, 2), box, newlines=True)])
    item = ImageRows(rows_of(9), np.arange(9), layout)
    newline = np.full(WIDTH, -1, np.float32)
    prompt = stitch(encoder_of(NEXT), "<image> <image>", [item, few(item, [2, 3, 8])], newline=newline)
    assert prompt.rows[:, 0].tolist() == [0, 1, 2, -1, 3, 4, 5, 6, 7, 8, -1, 2, -1, 3, 8, -1]
    assert prompt.counts == (11, 5)


def test_newlines_need_the_order_of_the_picture() -> None:
    layout = tiles_layout((1, 2), (2, 2))
    for positions in ([3, 2], [2, 2], [2, -1]):
        item = ImageRows(rows_of(2), np.array(positions), layout)
        with pytest.raises(PromptError, match="in the order of the picture"):
            stitch(encoder_of(NEXT), "<image>", [item], newline=np.zeros(WIDTH))
        assert stitch(encoder_of(NEXT), "<image>", [item]).counts == (2,)


# --------------------------------------------------------------------------------------------- the word before it


def start_prompt(positions: Sequence[int], text: str = "a<|vision_start|><|image_pad|><|vision_end|>b"):  # type: ignore[no-untyped-def]
    """A picture of 2 x 3 tokens of which a rule kept some; 6 is the word before it, -1 a zero row."""
    rows = np.array([[float(position)] * WIDTH for position in positions], np.float32)
    item = ImageRows(rows, np.array(positions), grid_layout(2, 3))
    return stitch(encoder_of(QWEN), text, [item], start_counts=True)


def test_the_word_before_a_picture_is_where_the_rule_puts_it() -> None:
    encoder = encoder_of(QWEN)
    start, end = encoder.ids_from_text("<|vision_start|><|vision_end|>")
    pad = spec_of(QWEN).decoder.image_token_id
    (before,), (behind,) = encoder.ids_from_text("a"), encoder.ids_from_text("b")
    prompt = start_prompt([4, 6, 5, -1])
    assert prompt.input_ids.tolist() == [before, pad, start, pad, pad, end, behind]
    assert prompt.rows[:, 0].tolist() == [4, 5, -1]
    assert prompt.counts == (3,)
    assert prompt.position_ids is not None
    # the picture begins at 2: token 4 is in row 1, column 1, token 5 behind it, and a zero row is where the last one is
    assert prompt.position_ids.tolist() == [
        [0, 2, 1, 2, 2, 5, 6],
        [0, 3, 1, 3, 3, 5, 6],
        [0, 3, 1, 4, 4, 5, 6],
    ]
    assert prompt.next_position == 7
    first = start_prompt([6, 0])
    assert first.input_ids.tolist() == [before, start, pad, end, behind]


def test_the_word_before_a_picture_goes_if_the_rule_drops_it() -> None:
    prompt = start_prompt([4, 5])
    end = encoder_of(QWEN).ids_from_text("<|vision_end|>")[0]
    pad = spec_of(QWEN).decoder.image_token_id
    assert prompt.input_ids.tolist()[1:-1] == [pad, pad, end]
    assert prompt.position_ids is not None
    assert prompt.position_ids[0].tolist() == [0, 2, 2, 5, 6], "what is left stays where it was"
    assert prompt.counts == (2,)


def test_two_pictures_and_their_words() -> None:
    layout = grid_layout(2, 3)
    items = [
        ImageRows(rows_of(2), np.array([6, 1]), layout),
        ImageRows(rows_of(3, 10), np.array([0, 5, 6]), layout),
    ]
    text = "<|vision_start|><|image_pad|><|vision_end|>and<|vision_start|><|image_pad|><|vision_end|>"
    prompt = stitch(encoder_of(QWEN), text, items, start_counts=True)
    start = encoder_of(QWEN).ids_from_text("<|vision_start|>")[0]
    assert runs(prompt.input_ids, prompt.image_token_id) == [1, 2]
    assert np.flatnonzero(prompt.input_ids == start).tolist() == [0, len(prompt) - 2]
    assert prompt.rows[:, 0].tolist() == [1, 10, 11]
    assert prompt.counts == (1, 2)


def test_there_must_be_a_word_before_a_picture() -> None:
    for text in ("<|image_pad|>b", "a<|image_pad|><|image_pad|>"):
        items = [ImageRows(rows_of(1), np.array([0]), grid_layout(2, 3))] * text.count("<|image_pad|>")
        with pytest.raises(PromptError, match="no word before"):
            stitch(encoder_of(QWEN), text, items, start_counts=True)
    with pytest.raises(PromptError, match="known by the layout"):
        stitch(encoder_of(NEXT), "a <image>", [rows_of(2)], start_counts=True)


def test_the_word_is_no_row_where_the_rule_does_not_choose_it() -> None:
    item = ImageRows(rows_of(1), np.array([7]), grid_layout(2, 3))
    with pytest.raises(PromptError, match=r"outside 0\.\.5"):
        stitch(encoder_of(QWEN), "a<|image_pad|>b", [item])


# ---------------------------------------------------------------------------------------------------------- length


def test_length_is_checked_by_positions_too() -> None:
    """Three kept tokens of a picture nearly as long as the context: the words behind it are near its end."""
    encoder = encoder_of(QWEN)
    long = few(image(1, 2250), [0, 7, 2249])
    text = "<|vision_start|><|image_pad|><|vision_end|>what?"
    prompt = stitch(encoder, text, [long])
    assert prompt.next_position is not None
    assert len(prompt) < 20 < 2250 < prompt.next_position <= 2304
    with pytest.raises(PromptError, match=rf"reaches the position {prompt.next_position}.*context of 2304") as caught:
        stitch(encoder, text, [long], max_new_tokens=2305 - prompt.next_position)
    assert "Lower max_new_tokens" in caught.value.hint
    with pytest.raises(PromptError, match="context of 2304") as caught:
        stitch(encoder, text, [few(image(1, 2400), [0])], max_new_tokens=1)
    assert "pruning does not change positions" in caught.value.hint


def test_what_cannot_fit_is_refused_before_anything_is_seen() -> None:
    encoder = encoder_of(QWEN)
    check_fit(encoder, "<|image_pad|><|video_pad|> what?", images=1, videos=1)
    with pytest.raises(PromptError, match=r"more than the context of 2304"):
        check_fit(encoder, "<|image_pad|>" + " 1" * 2304, images=1)
    with pytest.raises(PromptError, match="prompt is empty"):
        check_fit(encoder, " ", images=0)
    short = replace(encoder, decoder=encoder.decoder.model_copy(update={"context": 6}))
    check_fit(short, "<|image_pad|>1111", images=1)
    with pytest.raises(PromptError, match="5 tokens"):
        check_fit(short, "<|image_pad|>1111", images=1, max_new_tokens=2)


def test_rows_must_be_as_wide_as_the_model() -> None:
    with pytest.raises(PromptError, match=r"shape \(2, 5\), the decoder takes rows of width 128"):
        stitch(encoder_of(QWEN), "<|image_pad|>", [ImageRows(np.zeros((2, 5)), np.arange(2), grid_layout(1, 2))])
    with pytest.raises(PromptError, match="where in a picture each of its rows lies"):
        stitch(encoder_of(QWEN), "<|image_pad|>", [rows_of(2)])
