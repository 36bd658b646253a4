"""A session from bundle to answer: a reciting decoder for the bookkeeping, GenAI and transformers for the truth."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import RecitingDecoder, toy_tokens
from transformers import AutoProcessor, LlavaForConditionalGeneration

from holov_export.bundle import Bundle
from holov_export.errors import (
    BudgetError,
    BundleError,
    EnvironmentFaultError,
    ImageError,
    IntegrityError,
    PromptError,
    UnknownNameError,
    UsageError,
)
from holov_export.runtime.preprocess import pixels_from_images
from holov_export.runtime.session import Session
from holov_export.spec import ModelSpec
from holov_export.tensors import SamplingSettings

SHORT = SamplingSettings(max_new_tokens=24)


@pytest.fixture(scope="module")
def session(answering_bundle: Bundle) -> Iterator[Session]:
    with Session.open(answering_bundle, provider="cpu", threads=1) as opened:
        yield opened


def reciting(bundle: Bundle, text: str) -> tuple[Session, RecitingDecoder]:
    """A session whose decoder says `text`."""
    session = Session.open(bundle, decoder="none", provider="cpu", threads=1)
    decoder = RecitingDecoder(session.encoder.tokenizer.encode(text, add_special_tokens=False).ids)
    return Session.open(bundle, decoder=decoder, provider="cpu", threads=1), decoder


# --------------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_answer_is_that_of_transformers(
    session: Session, llava_checkpoint: Path, llava_spec: ModelSpec, photographs: list[Image.Image], budget: int
) -> None:
    """Question, template, placeholders, rows and decoder at once, against LlavaProcessor and generate()."""
    answer = session.ask(photographs[0], "what is this?", budget=budget, sampling=SHORT)
    model = LlavaForConditionalGeneration.from_pretrained(llava_checkpoint).eval()
    processor = AutoProcessor.from_pretrained(llava_checkpoint)
    parts = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    ids = processor.tokenizer(text.replace("<image>", "<image>" * budget), return_tensors="pt")["input_ids"]
    pixels = pixels_from_images([photographs[0]], llava_spec.image).pixel_values
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[0, ids[0] == 3] = torch.from_numpy(toy_tokens(pixels, llava_spec)[0, :budget])
        out = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
    assert list(answer.token_ids) == [token for token in out[0].tolist() if token != 2]
    assert answer.prompt_tokens == ids.shape[1]
    assert answer.visual_tokens == (budget,)


def test_both_decoders_agree(
    session: Session, answering_bundle: Bundle, llava_checkpoint: Path, photographs: list[Image.Image]
) -> None:
    with Session.open(answering_bundle, decoder="hf", checkpoint=llava_checkpoint, provider="cpu", threads=1) as other:
        for question in ("what is this?", "count the digits"):
            mine = session.ask(photographs[:2], question, budget=9, quota=[9, 4], sampling=SHORT)
            theirs = other.ask(photographs[:2], question, budget=9, quota=[9, 4], sampling=SHORT)
            assert (mine.token_ids, mine.text) == (theirs.token_ids, theirs.text)
            assert mine.visual_tokens == (9, 4)
        assert "transformers" in other.name
    assert "onnxruntime-genai" in session.name


def test_pieces_of_text_join_to_the_answer(session: Session, photographs: list[Image.Image]) -> None:
    pieces: list[str] = []
    answer = session.ask(photographs[1], "what is this?", sampling=SHORT, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert all(pieces)
    assert len(answer.token_ids) == 24
    assert answer.finish_reason == "length"


def test_batch_equals_singles(session: Session, photographs: list[Image.Image]) -> None:
    questions = ["what is this?", "how many are there?", "is <image> red?"]
    batch = session.ask_batch(photographs[:3], questions, budget=12, quota=[12, 5, 1], sampling=SHORT)
    for index, (image, question, quota) in enumerate(zip(photographs, questions, [12, 5, 1], strict=False)):
        single = session.ask(image, question, budget=12, quota=[quota], sampling=SHORT)
        assert single.token_ids == batch[index].token_ids
        assert single.visual_tokens == batch[index].visual_tokens == (quota,)


def test_batch_of_prompts_with_different_numbers_of_images(session: Session, photographs: list[Image.Image]) -> None:
    groups = [photographs[:2], photographs[2], [photographs[3]]]
    answers = session.ask_batch(groups, ["a?", "b?", "c?"], budget=6, quota=[6, 2, 3, 1], sampling=SHORT)
    assert [answer.visual_tokens for answer in answers] == [(6, 2), (3,), (1,)]


def test_sampling_with_a_seed(session: Session, photographs: list[Image.Image]) -> None:
    warm = replace(SHORT, temperature=1.2, seed=5)
    first, again, other = (
        session.ask(photographs[0], "what?", sampling=item).token_ids for item in (warm, warm, replace(warm, seed=6))
    )
    assert first == again != other


# --------------------------------------------------------------------------------------------------- bookkeeping


def test_default_budget(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    assert session.default_budget == 7
    assert session.ask(photographs[0], "is it?").visual_tokens == (7,)
    assert session.ask(photographs[:2], "is it?", quota=[3, 11]).visual_tokens == (3, 11)
    np.testing.assert_array_equal(decoder.prompts[0].rows, session.see(photographs[0], 7).rows(0))


def test_raw_prompt_is_passed_verbatim(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    session.ask(photographs[0], "Q: {{ x }} <image> A:", raw=True)
    assert decoder.prompts[-1].text == "Q: {{ x }} <image> A:"
    with pytest.raises(PromptError, match="no placeholder for 1 image"):
        session.ask(photographs[0], "what?", raw=True)
    with pytest.raises(PromptError, match="prompt is empty"):
        session.ask(photographs[0], " ", raw=True)


def test_images_come_in_every_form(toy_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    path = tmp_path / "photo.png"
    photographs[1].save(path)
    stream = io.BytesIO(path.read_bytes())
    forms = [photographs[1], path, str(path), stream.getvalue(), np.asarray(photographs[1]), [path]]
    for form in forms:
        session.ask(form, "is it?", budget=4)  # type: ignore[arg-type]
    for prompt in decoder.prompts[1:]:
        np.testing.assert_array_equal(prompt.rows, decoder.prompts[0].rows)
    session.ask([path, photographs[0]], "which?", budget=4)
    assert decoder.prompts[-1].counts == (4, 4)


def test_see_needs_no_decoder_and_no_tokenizer(
    toy_bundle: Bundle, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.open(toy_bundle, provider="cpu", threads=1)
    monkeypatch.setattr(Session, "encoder", property(lambda self: pytest.fail("it loaded the tokenizer")))
    visual = session.see(photographs[:2], quota=[5, 2])
    assert visual.counts.tolist() == [5, 2]
    assert visual.saliency is not None
    assert visual.saliency.shape == (2, 64)
    monkeypatch.undo()
    with pytest.raises(BundleError, match="exported without a decoder"):
        session.ask(photographs[0], "what?")
    with pytest.raises(UsageError, match="opened without a decoder"):
        Session.open(toy_bundle, decoder="none", provider="cpu").ask(photographs[0], "what?")


def test_decoder_is_loaded_once_and_closed(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    with session:
        session.ask(photographs[0], "a?")
        session.ask(photographs[0], "b?")
        assert len(decoder.prompts) == 2
    assert decoder.closed


@pytest.mark.parametrize(
    ("stop", "text"),
    [((), "the red one is left"), ((" one",), "the red"), (("d on", "left"), "the re"), (("the",), "")],
)
def test_stop_strings(toy_bundle: Bundle, photographs: list[Image.Image], stop: tuple[str, ...], text: str) -> None:
    session, decoder = reciting(toy_bundle, "the red one is left")
    pieces: list[str] = []
    answer = session.ask(photographs[0], "a?", sampling=SamplingSettings(stop=stop), on_text=pieces.append)
    assert answer.text == "".join(pieces) == text
    assert answer.finish_reason == "stop"
    if stop:
        assert decoder.given < len(decoder.ids), "decoding ends with the stop string"
        assert answer.token_ids == tuple(decoder.ids[: decoder.given - 1])


def test_finish_reasons(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, decoder = reciting(toy_bundle, "the red one is left")
    whole = len(decoder.ids)
    cases = {whole - 1: "length", whole: "length", whole + 1: "stop"}
    for limit, reason in cases.items():
        assert (
            session.ask(photographs[0], "a?", sampling=SamplingSettings(max_new_tokens=limit)).finish_reason == reason
        )


def test_answer_without_a_token(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    decoder.ids = []
    answer = session.ask(photographs[0], "a?")
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "stop")
    assert answer.timings.decode >= 0


def test_timings(session: Session, photographs: list[Image.Image]) -> None:
    timings = session.ask(photographs[0], "what is this?", sampling=SHORT).timings
    parts = (timings.preprocess, timings.vision, timings.stitch, timings.setup, timings.prefill, timings.decode)
    assert all(part > 0 for part in parts)
    assert timings.total == pytest.approx(sum(parts))
    assert timings.ttft == pytest.approx(sum(parts[:5]))
    assert timings.total < 30


# ------------------------------------------------------------------------------------------------------ refusals


def test_an_answer_ends_where_the_context_ends(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    session.ask(photographs[0], "a?", sampling=SamplingSettings(max_new_tokens=10_000))
    asked = decoder.samplings[-1]
    assert asked.max_new_tokens == 512 - len(decoder.prompts[-1])


def test_refusals_pass_through(toy_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    photo = photographs[0]
    with pytest.raises(BudgetError, match=r"1\.\.64"):
        session.ask(photo, "a?", budget=65)
    with pytest.raises(BudgetError, match="2 quotas for 1 image"):
        session.ask(photo, "a?", quota=[3, 4])
    with pytest.raises(ImageError, match="does not exist"):
        session.ask(tmp_path / "none.png", "a?")
    with pytest.raises(ImageError, match="there is no image"):
        session.ask([], "a?")
    with pytest.raises(PromptError, match="2 placeholders and 1 image"):
        session.ask(photo, "<image> or <image>?")
    with pytest.raises(PromptError, match="context of 512"):
        session.ask(photo, "a? " * 300)
    with pytest.raises(UsageError, match="temperature"):
        session.ask(photo, "a?", sampling=SamplingSettings(temperature=-1))
    with pytest.raises(PromptError, match="1 prompts and images for 2"):
        session.ask_batch([photo, photo], ["a?"])
    assert not decoder.prompts


def test_a_wrong_request_loads_no_decoder(toy_bundle: Bundle, photographs: list[Image.Image], tmp_path: Path) -> None:
    """Loading takes gigabytes and minutes; a typing error in a file name must not cost them."""
    opened = Session.open(toy_bundle, decoder="none", provider="cpu", threads=1)
    session = Session(toy_bundle, opened._runners["image"], lambda: pytest.fail("it loaded the decoder"))
    photo = photographs[0]
    (tmp_path / "no.png").write_bytes(b"text")
    with pytest.raises(ImageError, match="does not exist"):
        session.ask(tmp_path / "none.png", "a?")
    with pytest.raises(ImageError, match="is not an image"):
        session.ask_batch([photo, tmp_path / "no.png"], ["a?", "b?"])
    with pytest.raises(BudgetError, match=r"1\.\.64"):
        session.ask(photo, "a?", budget=65)
    with pytest.raises(BudgetError, match="2 quotas for 1 image"):
        session.ask(photo, "a?", quota=np.array([3, 4]))
    with pytest.raises(BudgetError, match="quota of image 1 is 0"):
        session.ask(photo, "a?", budget=4, quota=[0])
    with pytest.raises(PromptError, match="no placeholder for 1 image"):
        session.ask(photo, "what?", raw=True)
    with pytest.raises(PromptError, match="context of 512"):
        session.ask(photo, "a? " * 300)


def test_the_decoder_is_loaded_before_the_vision_graph_runs_and_outside_the_timings(
    toy_bundle: Bundle, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, decoder = reciting(toy_bundle, "yes")
    events: list[str] = []

    def load() -> RecitingDecoder:
        events.append("decoder")
        time.sleep(2)
        return decoder

    run = opened._runners["image"].run
    monkeypatch.setattr(opened._runners["image"], "run", lambda *a, **k: events.append("vision") or run(*a, **k))
    answer = Session(toy_bundle, opened._runners["image"], load).ask(photographs[0], "a?")
    assert events == ["decoder", "vision"]
    assert answer.timings.total < 2


def test_numpy_quota(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, _ = reciting(toy_bundle, "yes")
    assert session.ask(photographs[:2], "is it?", quota=np.array([3, 11])).visual_tokens == (3, 11)
    assert session.see(photographs[:2], quota=np.array([5, 2])).counts.tolist() == [5, 2]


def test_a_closed_session_loads_nothing(toy_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session, decoder = reciting(toy_bundle, "yes")
    session.ask(photographs[0], "a?")
    session.close()
    session.close()
    for use in (
        lambda: session.decoder,
        lambda: session.name,
        lambda: session.ask(photographs[0], "a?"),
        lambda: session.see(photographs[0]),
    ):
        with pytest.raises(EnvironmentFaultError, match="the session is closed"):
            use()
    assert len(decoder.prompts) == 1


def test_open_refuses(toy_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError,
        match=r"unknown decoder 'gpt'.*auto, genai, ort, hf, llamacpp, vllm, vllm-server, trtllm, trtllm-api, none",
    ):
        Session.open(toy_bundle, decoder="gpt")
    with pytest.raises(UsageError, match="needs the checkpoint"):
        Session.open(toy_bundle, decoder="hf")
    with pytest.raises(UnknownNameError, match="unknown provider"):
        Session.open(toy_bundle, provider="tpu")
    with pytest.raises(BundleError, match="is not a bundle"):
        Session.open(tmp_path)


def test_open_verifies(answering_bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(answering_bundle.folder, copy)
    graph = copy / "decoder" / "embedding.onnx"
    content = bytearray(graph.read_bytes())
    content[-20] ^= 1
    graph.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=r"decoder/embedding\.onnx differs"):
        Session.open(copy)
    Session.open(copy, verify="size").close()
