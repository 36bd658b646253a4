"""The models of a Triton repository, without Triton: batches, refusals, lanes, cancellation."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton_standin
from PIL import Image
from toys import RecitingDecoder
from triton_standin import InferenceRequest, Tensor, TritonError, arguments, texts

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, BusyError, EnvironmentFaultError, PromptError, UsageError
from holov_export.runtime.answer_stream import AnswerStream
from holov_export.runtime.session import Session
from holov_export.serve.triton import bridge as bridge_module
from holov_export.serve.triton import decoder_model as decoder_models
from holov_export.serve.triton import encoder_model, prompt_model, vision_model
from holov_export.serve.triton.bridge import Bridge
from holov_export.serve.triton.decoding import DecodingLoop
from holov_export.serve.triton.picture_layouts import layout_from_text, text_from_layout
from holov_export.serve.triton.sampling import sampling_from_request
from holov_export.serve.triton.settings import ModelSettings
from holov_export.tensors import CropBox, ImageLayout, Region, SamplingSettings, StitchedPrompt


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton_python_backend_utils", triton_standin)
    triton_standin.Logger.lines.clear()


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> bytes:
    dice = np.random.default_rng(seed)
    stream = io.BytesIO()
    Image.fromarray(dice.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size).save(stream, "PNG")
    return stream.getvalue()


def budgets(*numbers: int) -> np.ndarray:
    return np.array([numbers], dtype=np.int32)


class TestVision:
    @pytest.fixture
    def model(self, toy_bundle: Bundle) -> Iterator[vision_model.VisionModel]:
        made = vision_model.VisionModel()
        made.initialize(arguments(ModelSettings(bundle=str(toy_bundle.folder), images=3)))
        yield made
        made.finalize()

    def test_requests_run_together_and_a_wrong_one_fails_alone(
        self, model: vision_model.VisionModel, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = [picture(1), picture(2), picture(3)]
        runs: list[tuple[int, ...]] = []
        see = model._session.see_groups
        monkeypatch.setattr(
            model._session, "see_groups", lambda groups, quota: (runs.append(tuple(quota)), see(groups, quota))[1]
        )
        answers = model.execute(
            [
                InferenceRequest({"images": texts(files[0], shape=(1, 1)), "budget": budgets(5)}),
                InferenceRequest({"images": texts(files[0][:70], shape=(1, 1)), "budget": budgets(5)}),
                InferenceRequest({"images": texts(files[1], files[2], shape=(1, 2)), "budget": budgets(2, 9)}),
                InferenceRequest({"images": texts(files[1], shape=(1, 1)), "budget": budgets(65)}),
                InferenceRequest({"images": texts(files[2], shape=(1, 1))}),
            ]
        )
        assert runs == [(5, 2, 9, 7)]  # 7: a ninth of 64
        assert [answer.has_error() for answer in answers] == [False, True, False, True, False]
        assert {answers[1].error().code(), answers[3].error().code()} == {TritonError.INVALID_ARG}
        assert "1..64" in answers[3].error().message()
        with Session.open(toy_bundle, decoder="none") as session:
            own = session.see(files, quota=[5, 2, 9])
        found = answers[2].values()
        assert found["counts"].tolist() == [[2, 9]] and found["layouts"].tolist() == [[b"", b""]]
        np.testing.assert_array_equal(found["tokens"][0], np.concatenate([own.rows(1), own.rows(2)]))
        np.testing.assert_array_equal(found["positions"][0, 2:], own.positions[2, :9])

    def test_prompts_of_one_request_are_filled_up(self, model: vision_model.VisionModel) -> None:
        (answer,) = model.execute(
            [InferenceRequest({"images": texts(picture(1), picture(2), shape=(2, 1)), "budget": budgets(3, 6).T})]
        )
        found = answer.values()
        assert found["tokens"].shape[:2] == (2, 6) and found["counts"].tolist() == [[3], [6]]
        assert not found["tokens"][0, 3:].any() and found["positions"][0, 3:].tolist() == [-1] * 3

    def test_a_text_is_no_path(self, model: vision_model.VisionModel, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(picture(1))
        requests = [InferenceRequest({"images": texts(item, shape=(1, 1))}) for item in (str(tmp_path / "a.png"), "")]
        first, second = model.execute(requests)
        assert "is not an image" in first.error().message() and "empty" in second.error().message()

    def test_too_many_images(self, model: vision_model.VisionModel) -> None:
        (answer,) = model.execute([InferenceRequest({"images": texts(*[picture(1)] * 4, shape=(1, 4))})])
        assert "it can have 1 to 3" in answer.error().message()

    def test_a_fault_of_ours_is_told_as_one(
        self, model: vision_model.VisionModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(groups: object, quota: object) -> None:
            raise ZeroDivisionError("of ours")

        monkeypatch.setattr(model._session, "see_groups", broken)
        (answer,) = model.execute([InferenceRequest({"images": texts(picture(1), shape=(1, 1))})])
        assert answer.error().code() == TritonError.INTERNAL and "of ours" in triton_standin.Logger.lines[0]

    @pytest.mark.parametrize("budget", [budgets(1, 2, 3), np.array([1], dtype=np.int32), budgets(-1)])
    def test_budgets_that_fit_no_image(self, budget: np.ndarray) -> None:
        with pytest.raises(BudgetError):
            vision_model.quota_from_input(budget, 1, 2, 7, 64)

    def test_zero_is_the_usual_budget(self) -> None:
        assert vision_model.quota_from_input(budgets(0, 4), 1, 2, 7, 64) == (7, 4)
        assert vision_model.quota_from_input(np.array([[0], [4]]), 2, 2, 7, 64) == (7, 7, 4, 4)


class TestPromptAndDecoder:
    @pytest.fixture
    def prompts(self, toy_bundle: Bundle) -> prompt_model.PromptModel:
        made = prompt_model.PromptModel()
        made.initialize(arguments(ModelSettings(bundle=str(toy_bundle.folder))))
        return made

    @pytest.fixture
    def decoding(
        self, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[[RecitingDecoder], decoder_models.DecoderModel]]:
        made = decoder_models.DecoderModel()

        def model(decoder: RecitingDecoder) -> decoder_models.DecoderModel:
            monkeypatch.setattr(ModelSettings, "decoding_session", lambda self, b: Session(b, None, lambda: decoder))
            made.initialize(arguments(ModelSettings(bundle=str(toy_bundle.folder), new_tokens=50)))
            return made

        yield model
        made.finalize()

    def ask(self, prompts: prompt_model.PromptModel, toy_bundle: Bundle) -> dict[str, np.ndarray]:
        width = toy_bundle.manifest.plan.model.decoder.width
        rows = np.arange(5 * width, dtype=np.float32).reshape(5, width)
        request = {
            "question": texts("what is this?"),
            "tokens": rows,
            "positions": np.arange(5),
            "counts": np.array([2, 3]),
            "layouts": texts("", ""),
        }
        (answer,) = prompts.execute([InferenceRequest(request)])
        return answer.values()

    def test_a_prompt_has_a_place_for_each_row(self, prompts: prompt_model.PromptModel, toy_bundle: Bundle) -> None:
        found = self.ask(prompts, toy_bundle)
        assert np.count_nonzero(found["input_ids"] == toy_bundle.manifest.plan.model.decoder.image_token_id) == 5
        assert found["row_counts"].tolist() == [2, 3] and found["next_position"].tolist() == [-1]
        assert found["position_ids"].shape == (0, 0) and found["text"][0].count(b"<image>") == 2

    def test_counts_that_contradict_the_rows(self, prompts: prompt_model.PromptModel, toy_bundle: Bundle) -> None:
        width = toy_bundle.manifest.plan.model.decoder.width
        request = {"question": texts("what?"), "tokens": np.zeros((2, width), dtype=np.float32),
                   "positions": np.arange(2), "counts": np.array([3])}  # fmt: skip
        (answer,) = prompts.execute([InferenceRequest(request)])
        assert "do not fit" in answer.error().message()

    def test_an_answer_comes_token_by_token(
        self,
        prompts: prompt_model.PromptModel,
        toy_bundle: Bundle,
        decoding: Callable[[RecitingDecoder], decoder_models.DecoderModel],
    ) -> None:
        found = self.ask(prompts, toy_bundle)
        found.pop("text")
        decoder = RecitingDecoder([70, 71, 72])
        model = decoding(decoder)
        request = InferenceRequest({**found, "max_new_tokens": np.array([2], dtype=np.int32)}, "a")
        model.execute([request])
        wait(lambda: request.sender.ended == 1)
        values = [response.values() for response in request.sender.sent]
        assert [item["token_ids"].tolist() for item in values if item["token_ids"].size] == [[70], [71]]
        assert values[-1]["finish_reason"].tolist() == [b"length"] and values[0]["finish_reason"].tolist() == [b""]
        np.testing.assert_array_equal(decoder.prompts[0].rows, found["rows"])

    def test_another_request_cancels_by_name(
        self,
        prompts: prompt_model.PromptModel,
        toy_bundle: Bundle,
        decoding: Callable[[RecitingDecoder], decoder_models.DecoderModel],
    ) -> None:
        found = self.ask(prompts, toy_bundle)
        found.pop("text")
        model = decoding(SlowDecoder([70] * 50))
        request = InferenceRequest({**found, "max_new_tokens": np.array([50], dtype=np.int32)}, "a")
        model.execute([request])
        wait(lambda: len(request.sender.sent) > 1)
        model.execute([cancel := InferenceRequest({"cancel": texts("a")}, wanted=["finish_reason"])])
        assert list(cancel.sender.sent[0].values()) == ["finish_reason"]
        model.execute([InferenceRequest({"cancel": texts("another")})])
        wait(lambda: request.sender.ended == 1)
        assert request.sender.sent[-1].values()["finish_reason"].tolist() == [b"cancelled"]
        assert "cancelled after" in triton_standin.Logger.lines[0]
        assert len(request.sender.sent) < 50 and model._cancelled == set() == model._running

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"input_ids": np.array([1, 10**6])}, "outside"),
            ({"row_counts": np.array([1])}, "image places"),
            ({"max_new_tokens": np.array([51], dtype=np.int32)}, "at most 50"),
            ({"top_p": np.array([0], dtype=np.float32)}, "top_p"),
            ({"stop": texts(b"\xff")}, "no UTF-8"),
        ],
    )
    def test_a_wrong_request_is_refused_at_once(
        self,
        prompts: prompt_model.PromptModel,
        toy_bundle: Bundle,
        decoding: Callable[[RecitingDecoder], decoder_models.DecoderModel],
        change: dict[str, Any],
        words: str,
    ) -> None:
        found = self.ask(prompts, toy_bundle)
        found.pop("text")
        request = InferenceRequest({**found, **change}, "a")
        decoding(RecitingDecoder([1])).execute([request])
        assert request.sender.ended == 1 and words in request.sender.sent[0].error().message()

    def test_sampling_is_what_the_request_says(self) -> None:
        request = InferenceRequest({"temperature": np.array([0.5], dtype=np.float32), "seed": np.array([7]),
                                    "stop": texts("a", "b")})  # fmt: skip
        wanted = SamplingSettings(max_new_tokens=40, temperature=0.5, seed=7, stop=("a", "b"))
        assert sampling_from_request(Bridge(), request, 40) == wanted


class SlowDecoder(RecitingDecoder):
    """Takes some time for each token, as a real one does."""

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        for token in super().stream(prompt, sampling):
            time.sleep(0.005)
            yield token


class Kept:
    """A sink that keeps everything."""

    def __init__(self, log: list[tuple[str, Any]], name: str, leave_after: int | None = None) -> None:
        self.log, self.name, self.leave_after = log, name, leave_after
        self.pieces = 0

    def cancelled(self) -> bool:
        return self.leave_after is not None and self.pieces >= self.leave_after

    def piece(self, text: str, token_ids: list[int]) -> None:
        self.pieces += 1
        self.log.append((self.name, token_ids))

    def finished(self, reason: str) -> None:
        self.log.append((self.name, reason))

    def failed(self, error: Exception) -> None:
        self.log.append((self.name, error))


def wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in five seconds"
        time.sleep(0.002)


class TestLoop:
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(chr(token) for token in ids))
    prompt = StitchedPrompt(np.array([1]), np.zeros((0, 4), dtype=np.float32), (), 5, "")

    def maker(self, decoder: RecitingDecoder, length: int) -> Callable[[], AnswerStream]:
        sampling = SamplingSettings(max_new_tokens=length)
        return lambda: AnswerStream(decoder, self.prompt, sampling, self.tokenizer)

    def test_open_answers_take_turns_and_others_wait(self) -> None:
        log: list[tuple[str, Any]] = []
        loop = DecodingLoop(2, 8)
        decoder = SlowDecoder([65, 66, 67])
        for name in "abc":
            loop.submit(self.maker(decoder, 3), Kept(log, name))
        wait(lambda: sum(isinstance(what, str) for _, what in log) == 3)
        loop.close()
        assert [what for name, what in log if name == "c"] == [[65], [66], [67], "length"]
        order = [name for name, _ in log]
        assert order.index("c") > order.index("b") and order[:4] in (list("abab"), list("aabb"), list("aaba"))

    def test_who_leaves_gives_the_lane_away(self) -> None:
        log: list[tuple[str, Any]] = []
        loop = DecodingLoop(1, 8)
        decoder = RecitingDecoder([65] * 100)
        loop.submit(self.maker(decoder, 100), Kept(log, "a", leave_after=2))
        loop.submit(self.maker(decoder, 1), Kept(log, "b"))
        wait(lambda: ("b", "length") in log)
        loop.close()
        assert [what for name, what in log if name == "a"] == [[65], [65], "cancelled"]

    def test_a_failure_is_that_of_one(self) -> None:
        log: list[tuple[str, Any]] = []
        loop = DecodingLoop(2, 8)

        def broken() -> AnswerStream:
            raise PromptError("no")

        loop.submit(broken, Kept(log, "a"))
        loop.submit(self.maker(RecitingDecoder([65]), 1), Kept(log, "b"))
        wait(lambda: ("b", "length") in log)
        loop.close()
        assert isinstance(dict(log[:1])["a"], PromptError)

    def test_a_full_queue_and_an_end(self) -> None:
        log: list[tuple[str, Any]] = []
        loop = DecodingLoop(1, 1)
        decoder = SlowDecoder([65] * 500)
        loop.submit(self.maker(decoder, 500), Kept(log, "a"))
        wait(lambda: len(log) > 0)
        loop.submit(self.maker(decoder, 500), Kept(log, "b"))
        with pytest.raises(BusyError, match="wait already"):
            loop.submit(self.maker(decoder, 500), Kept(log, "c"))
        loop.close()
        ends = {name: what for name, what in log if isinstance(what, Exception)}
        assert set(ends) == {"a", "b"}
        with pytest.raises(BusyError, match="shutting down"):
            loop.submit(self.maker(decoder, 1), Kept(log, "d"))


class TestEncoder:
    def test_the_table_holds_the_kept_rows_of_every_request(self, toy_bundle: Bundle) -> None:
        model = encoder_model.EncoderModel()
        settings = encoder_model.EncoderSettings(bundle=str(toy_bundle.folder), budget=6)
        model.initialize(arguments(settings))
        size = toy_bundle.manifest.plan.model.clip.image_size
        pixels = np.random.default_rng(0).normal(size=(5, 3, size, size)).astype(np.float16)
        requests = [
            InferenceRequest({"IMAGE": pixels[:1, None]}),
            InferenceRequest({"pixel_values": pixels[None, 1:3]}),
            InferenceRequest({"max_tokens": np.array([[1]], dtype=np.int32)}),
            InferenceRequest({"IMAGE": pixels[3:, None]}),
            InferenceRequest({"IMAGE": pixels[:1, None, :, 1:]}),
        ]
        one, two, nothing, batch, cut = model.execute(requests)
        boxes = (CropBox(0, 0, size, size),) * 5
        own = model._runner.run(encoder_model.PixelBatch(pixels.astype(np.float32), boxes, ((size, size),) * 5), 6)
        model.finalize()
        tokens = own.tokens.astype(np.float16)
        for answer, wanted in ((one, tokens[:1]), (two, tokens[1:3].reshape(1, 12, -1)), (batch, tokens[3:])):
            found = answer.values()
            np.testing.assert_array_equal(found["OUT_PROMPT_EMBEDDING_TABLE"], wanted)
            assert found["OUT_PROMPT_VOCAB_SIZE"].tolist() == [[wanted.shape[1]]] * len(wanted)
            assert found["OUT_PROMPT_VOCAB_SIZE"].dtype == np.int32
        assert "neither pixel_values nor IMAGE" in nothing.error().message() and "H = W" in cut.error().message()


def test_a_stub_of_another_numpy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "as_numpy", lambda self: np.zeros_like(self._array))
    with pytest.raises(EnvironmentFaultError, match="numpy<2"):
        Bridge()
    bridge = Bridge(strings=False)
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]
    np.testing.assert_array_equal(bridge.array(bridge.tensor("x", sent)), sent)


def test_responses_are_kept_when_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Call:
        def exec(self, decoupled: bool) -> list[int]:
            assert decoupled
            return [1, 2]

    clock = iter((100.0, 120.0, 131.0))
    monkeypatch.setattr(bridge_module, "_kept", bridge_module.deque())
    monkeypatch.setattr(bridge_module.time, "monotonic", lambda: next(clock))
    kept = []
    for _ in range(3):
        assert list(bridge_module.responses_of(Call())) == [1, 2]
        kept.append([when for when, _ in bridge_module._kept])
    assert kept == [[100.0], [100.0, 120.0], [120.0, 131.0]]


def test_layouts_pass_as_text() -> None:
    regions = (Region((2, 3), CropBox(0, 0, 9, 6), newlines=True), Region((1, 1), CropBox(0, 0, 3, 3), cls=True))
    none = np.zeros(0, dtype=np.int64)
    layout = ImageLayout("image", 5, 8, np.arange(8)[::-1], regions, np.zeros((0, 2), dtype=np.int64), none)
    found = layout_from_text(text_from_layout(layout))
    assert found is not None and found.regions == regions and found.tokens == layout.tokens
    assert layout_from_text(text_from_layout(None)) is None
    with pytest.raises(UsageError):
        layout_from_text(text_from_layout(replace(layout, regions=())) + "x")
