"""Our side of the talk with a vLLM server, against a small server that talks alike."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from runtime.vllm_standin import Behaviour, serving

from holov_export.errors import EnvironmentFaultError, HolovExportError, NetworkError, PromptError, UsageError
from holov_export.runtime.decoder_vllm_server import VllmServerDecoder
from holov_export.runtime.vllm_http import http_from_url
from holov_export.runtime.vllm_inputs import wire_base64
from holov_export.spec import DecoderSpec, ModelSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

FOUR = SamplingSettings(max_new_tokens=4)
TEXT = "USER: <image>\nwhat? ASSISTANT:"


@pytest.fixture(scope="module")
def spec(llava_spec: ModelSpec) -> DecoderSpec:
    return llava_spec.decoder


@pytest.fixture
def behaviour(spec: DecoderSpec) -> Behaviour:
    return Behaviour(width=spec.width)


@pytest.fixture
def address(behaviour: Behaviour) -> Iterator[str]:
    with serving(behaviour) as found:
        yield found


def prompt_of(spec: DecoderSpec, *counts: int, text: str = TEXT) -> StitchedPrompt:
    """BOS, then each image's places and a word."""
    ids = [1]
    for count in counts:
        ids += [spec.image_token_id] * count + [40]
    rows = np.random.default_rng(0).normal(size=(sum(counts), spec.width)).astype(np.float32)
    return StitchedPrompt(np.array(ids, dtype=np.int64), rows, counts, spec.image_token_id, text)


class TestTokens:
    def test_the_prompt_goes_over_as_it_is(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        decoder = VllmServerDecoder(address, spec)
        prompt = prompt_of(spec, 3, 2)
        assert list(decoder.stream(prompt, FOUR)) == [11, 12, 13, 14]
        ((path, body, _),) = behaviour.requests
        assert path == "/inference/v1/generate" and decoder.way == "tokens" and decoder.lanes > 1
        assert body["token_ids"] == prompt.input_ids.tolist()
        assert body["model"] == "served" and body["stream"] and body["return_token_ids"]
        assert body["features"]["mm_placeholders"] == {
            "prompt_embeds": [{"offset": 1, "length": 3}, {"offset": 5, "length": 2}]
        }
        assert body["features"]["kwargs_data"] == {
            "prompt_embeds": [wire_base64(prompt.rows[:3]), wire_base64(prompt.rows[3:])]
        }
        assert len(set(body["features"]["mm_hashes"]["prompt_embeds"])) == 2

    def test_a_prompt_without_rows_has_no_features(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        list(VllmServerDecoder(address, spec).stream(prompt_of(spec, 0), FOUR))
        assert "features" not in behaviour.requests[0][1]

    def test_sampling_settings_go_over(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        sampling = replace(FOUR, temperature=0.7, top_k=5, top_p=0.8, seed=9, stop_token_ids=(99,))
        list(VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), sampling))
        settings = behaviour.requests[0][1]["sampling_params"]
        assert settings.items() >= {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "seed": 9, "max_tokens": 4}.items()
        assert settings["stop_token_ids"] == [2, 99] and settings["ignore_eos"] and settings["repetition_penalty"] == 1

    def test_the_token_that_ends_an_answer_is_kept_back(
        self, address: str, behaviour: Behaviour, spec: DecoderSpec
    ) -> None:
        behaviour.tokens, behaviour.finish = (11, 12, 2), "stop"
        assert list(VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR)) == [11, 12]

    def test_streams_can_be_pulled_in_turn(self, address: str, spec: DecoderSpec) -> None:
        decoder = VllmServerDecoder(address, spec)
        streams = [decoder.stream(prompt_of(spec, count), FOUR) for count in (1, 5, 0)]
        assert [[next(stream) for stream in streams] for _ in range(4)] == [[token] * 3 for token in (11, 12, 13, 14)]
        assert [next(stream, None) for stream in streams] == [None] * 3

    def test_the_server_learns_that_nobody_listens(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.tokens, behaviour.seconds = tuple(range(10, 410)), 0.005
        stream = VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), SamplingSettings(max_new_tokens=400))
        assert next(stream) == 10
        stream.close()  # type: ignore[attr-defined]
        assert behaviour.left.wait(5)

    def test_nothing_is_sent_before_the_first_token_is_asked_for(
        self, address: str, behaviour: Behaviour, spec: DecoderSpec
    ) -> None:
        VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR)
        assert behaviour.requests == []

    def test_a_key_goes_with_every_request(self, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.key = "sesame"
        with serving(behaviour) as address:
            list(VllmServerDecoder(f"{address}/v1", spec, api_key="sesame").stream(prompt_of(spec, 1), FOUR))
            with pytest.raises(UsageError, match="refuses the key") as caught:
                VllmServerDecoder(address, spec, api_key="poppy")
        assert behaviour.requests[0][2]["Authorization"] == "Bearer sesame"
        assert "poppy" not in str(caught.value)


class TestRefusals:
    def test_positions_that_are_three_numbers(self, spec: DecoderSpec) -> None:
        with pytest.raises(UsageError, match="M-RoPE"):
            VllmServerDecoder("http://127.0.0.1:9", spec.model_copy(update={"mrope_sections": (2, 3, 3)}))

    def test_a_model_of_another_width(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.width += 1
        with pytest.raises(UsageError, match=f"{spec.width} wide, the server's model 'served' takes {spec.width + 1}"):
            VllmServerDecoder(address, spec)

    def test_a_server_that_takes_no_rows(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.embeds = False
        with pytest.raises(EnvironmentFaultError, match="--enable-mm-embeds"):
            VllmServerDecoder(address, spec)

    def test_an_answer_longer_than_the_servers_context(
        self, address: str, behaviour: Behaviour, spec: DecoderSpec
    ) -> None:
        behaviour.context = 20
        decoder = VllmServerDecoder(address, spec)
        with pytest.raises(PromptError, match="context at 20"):
            decoder.stream(prompt_of(spec, 15), FOUR)
        assert len(list(decoder.stream(prompt_of(spec, 14), FOUR))) == 4

    def test_a_closed_decoder(self, address: str, spec: DecoderSpec) -> None:
        decoder = VllmServerDecoder(address, spec)
        decoder.close()
        with pytest.raises(EnvironmentFaultError, match="closed"):
            decoder.stream(prompt_of(spec, 1), FOUR)

    @pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://a:b@host"])
    def test_what_is_no_address(self, url: str, spec: DecoderSpec) -> None:
        with pytest.raises(UsageError, match="address"):
            VllmServerDecoder(url, spec)


class TestFaults:
    def test_nobody_there(self, spec: DecoderSpec) -> None:
        with socket.socket() as taken:  # bound but not listening: nothing answers there
            taken.bind(("127.0.0.1", 0))
            with pytest.raises(NetworkError, match=r"no vLLM server answers at http://127\.0\.0\.1"):
                VllmServerDecoder(f"http://127.0.0.1:{taken.getsockname()[1]}", spec)

    @pytest.mark.parametrize(
        ("status", "kind", "words"),
        [
            (400, UsageError, "refuses the request: no such thing"),
            (503, EnvironmentFaultError, "takes no request now"),
            (429, EnvironmentFaultError, "takes no request now"),
            (500, EnvironmentFaultError, r"failed \(500\): no such thing"),
        ],
    )
    def test_a_refusal(
        self,
        status: int,
        kind: type[HolovExportError],
        words: str,
        address: str,
        behaviour: Behaviour,
        spec: DecoderSpec,
    ) -> None:
        stream = VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR)
        behaviour.status, behaviour.message = status, "no such thing"
        with pytest.raises(kind, match=words):
            next(stream)

    def test_an_error_in_the_middle(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.error_after = 2
        stream = VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR)
        assert [next(stream), next(stream)] == [11, 12]
        with pytest.raises(EnvironmentFaultError, match="EngineCore encountered an issue"):
            next(stream)

    def test_a_connection_that_breaks(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.cut_after = 1
        stream = VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR)
        assert next(stream) == 11
        with pytest.raises(NetworkError):
            next(stream)

    def test_silence(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.silent_after = 1
        stream = VllmServerDecoder(address, spec, timeout=0.2).stream(prompt_of(spec, 1), FOUR)
        assert next(stream) == 11
        with pytest.raises(NetworkError, match=r"said nothing for 0\.2 s"):
            next(stream)

    @pytest.mark.parametrize(("tokens", "finish"), [((11, 12), "length"), ((11, 12, 13, 14), "abort")])
    def test_an_answer_that_ends_early(
        self, tokens: tuple[int, ...], finish: str, address: str, behaviour: Behaviour, spec: DecoderSpec
    ) -> None:
        behaviour.tokens, behaviour.finish = tokens, finish
        with pytest.raises(EnvironmentFaultError, match=f"ended the answer early: {finish}"):
            list(VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR))

    def test_an_answer_to_another_prompt(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.prompt_ids = [1, 2]
        with pytest.raises(PromptError, match="another prompt: 2 token ids, not the 3"):
            next(VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR))


class TestChat:
    @pytest.fixture(autouse=True)
    def _no_scale_out(self, behaviour: Behaviour) -> None:
        behaviour.scale_out = False

    def test_the_text_and_the_images_go_over(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        prompt = prompt_of(spec, 3, 3)
        behaviour.prompt_ids = prompt.input_ids.tolist()
        decoder = VllmServerDecoder(address, spec)
        assert list(decoder.stream(prompt, FOUR)) == [11, 12, 13, 14]
        assert (decoder.way, decoder.lanes) == ("chat", 1)
        ((path, body, _),) = behaviour.requests
        assert path == "/v1/chat/completions" and body["chat_template"] == "{{ messages[0]['content'] }}"
        (message,) = body["messages"]
        *images, text = message["content"]
        assert text == {"type": "text", "text": TEXT} and body["add_special_tokens"] and body["max_tokens"] == 4
        found = [np.load(io.BytesIO(base64.b64decode(image["image_embeds"]))) for image in images]
        assert np.array_equal(np.stack(found), prompt.rows.reshape(2, 3, spec.width))

    def test_a_text_with_the_first_token_gets_no_second_one(
        self, address: str, behaviour: Behaviour, spec: DecoderSpec
    ) -> None:
        prompt = prompt_of(spec, 1, text=f"<s>{TEXT}")
        behaviour.prompt_ids = prompt.input_ids.tolist()
        list(VllmServerDecoder(address, spec).stream(prompt, FOUR))
        assert behaviour.requests[0][1]["add_special_tokens"] is False

    def test_without_rows_the_token_ids_go_over(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        prompt = prompt_of(spec, 0)
        assert list(VllmServerDecoder(address, spec).stream(prompt, FOUR)) == [11, 12, 13, 14]
        ((path, body, _),) = behaviour.requests
        assert path == "/v1/completions" and body["prompt"] == prompt.input_ids.tolist()

    @pytest.mark.parametrize("counts", [(3, 2), (3, 0)])
    def test_counts_that_would_end_the_engine_are_not_sent(
        self, counts: tuple[int, ...], address: str, behaviour: Behaviour, spec: DecoderSpec
    ) -> None:
        with pytest.raises(PromptError, match="--enable-scale-out"):
            VllmServerDecoder(address, spec).stream(prompt_of(spec, *counts), FOUR)
        assert behaviour.requests == []

    def test_other_token_ids_are_refused_before_a_token(
        self, address: str, behaviour: Behaviour, spec: DecoderSpec
    ) -> None:
        prompt = prompt_of(spec, 2)
        behaviour.prompt_ids = [*prompt.input_ids.tolist()[:-1], 41]
        with pytest.raises(PromptError, match="another prompt"):
            next(VllmServerDecoder(address, spec).stream(prompt, FOUR))

    def test_a_server_that_renders_its_own_prompts(self, address: str, behaviour: Behaviour, spec: DecoderSpec) -> None:
        behaviour.trusts = False
        with pytest.raises(EnvironmentFaultError, match="--enable-scale-out"):
            next(VllmServerDecoder(address, spec).stream(prompt_of(spec, 1), FOUR))


@pytest.mark.parametrize(
    ("url", "address", "prefix"),
    [
        ("http://host:8000", "http://host:8000", ""),
        ("http://host:8000/v1/", "http://host:8000", ""),
        ("https://host/llm/v1", "https://host/llm", "/llm"),
        ("http://[::1]:8000", "http://[::1]:8000", ""),
    ],
)
def test_addresses(url: str, address: str, prefix: str) -> None:
    found = http_from_url(url, None)
    assert (found.address, found.prefix, found.secure) == (address, prefix, url.startswith("https"))
