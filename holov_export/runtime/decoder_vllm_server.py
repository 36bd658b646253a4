"""A vLLM server's language model, over HTTP. Neither torch nor vLLM is needed on this side.

Two ways lead there, and the server's settings decide which:

tokens    /inference/v1/generate: token ids, and rows with their places. Exact, any counts, any number at once.
chat      /v1/chat/completions: the prompt's text and `image_embeds`. The server makes its own token ids of the text, so
          they are compared before the first token is given out. One request at a time, its images of equal counts:
          vLLM 0.32 stacks the images of a step, and where their counts differ the server's engine ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from holov_export.errors import EnvironmentFaultError, PromptError, UsageError
from holov_export.runtime.decoder import check_prompt, check_sampling, end_tokens
from holov_export.runtime.vllm_http import Reply, VllmHttp, fault_from_reply, http_from_url
from holov_export.runtime.vllm_inputs import (
    check_room,
    check_vllm,
    items_from_prompt,
    npy_base64,
    rows_of_images,
    vllm_sampling,
    wire_base64,
)
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

MODELS, GENERATE = "/v1/models", "/inference/v1/generate"
COMPLETIONS, CHAT, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/detokenize"
#: streams at once: vLLM's own number of requests in one step, further ones would wait there
_LANES = 128
#: the whole prompt is one message's text
_VERBATIM = "{{ messages[0]['content'] }}"
_FLAGS = "Start it with --enable-mm-embeds --enable-scale-out: docs/vllm.md."


class VllmServerDecoder:
    """The model of a running vLLM server.

    Attributes:
        way: "tokens" or "chat"; see the module.
        model: its name there.
        context: longest prompt and answer together.
    """

    def __init__(self, url: str, spec: DecoderSpec, *, api_key: str | None = None, timeout: float = 300.0) -> None:
        """Ask the server what it has and which way it takes.

        Args:
            url: "http://127.0.0.1:8000"; with "/v1" behind it as well.
            spec: of the language model that the server should have.
            api_key: of the server.
            timeout: seconds of silence after which a request is given up.

        Raises:
            UsageError: no address, another key, a model of another width, or one that vLLM would run wrongly.
            NetworkError: no server answers.
            EnvironmentFaultError: it is no vLLM server, or takes no visual rows.
        """
        check_vllm(spec)
        self._spec = spec
        self._http: VllmHttp = http_from_url(url, api_key, timeout=timeout)
        card = self._model_card()
        self.model = str(card["id"])
        self.context = min(int(card.get("max_model_len") or spec.context), spec.context)
        self._check_width()
        self.way = self._way()
        self._bos = self._text_of_bos() if self.way == "chat" else ""
        self.lanes = _LANES if self.way == "tokens" else 1
        self.name = f"vllm server {self._http.address}"
        self._closed = False

    def _model_card(self) -> dict[str, Any]:
        reply = self._http.get(MODELS)
        if reply.status in (401, 429, 503):
            raise fault_from_reply(reply, self._http.address)
        cards = reply.body.get("data")
        if reply.status != 200 or not isinstance(cards, list) or not cards or "id" not in cards[0]:
            raise EnvironmentFaultError(f"the server at {self._http.address} lists no models; is it a vLLM server?")
        card: dict[str, Any] = cards[0]
        return card

    def _check_width(self) -> None:
        """Refuse a model of another width, and a server that takes no rows.

        Rows of a wrong width would end the server's engine. A row of width 1 is refused before it gets there, and the
        refusal says what the model's width is.
        """
        row = npy_base64(np.zeros((1, 1), dtype=np.float32))
        reply = self._http.post(CHAT, {"model": self.model, "max_tokens": 1, "messages": _message("?", [row])})
        if "enable-mm-embeds" in reply.message:
            raise EnvironmentFaultError(f"the vLLM server at {self._http.address} takes no visual rows.", hint=_FLAGS)
        found = re.search(r"expects (\d+)", reply.message)
        if found and int(found[1]) != self._spec.width:
            raise UsageError(
                f"the visual rows are {self._spec.width} wide, the server's model '{self.model}' takes {found[1]}.",
                hint="Serve the checkpoint that the bundle was exported from.",
            )

    def _way(self) -> str:
        """Which way the server takes: a request without contents is refused where the path exists."""
        reply: Reply = self._http.post(GENERATE, {})
        if reply.status in (401, 429, 503):
            raise fault_from_reply(reply, self._http.address)
        return "tokens" if reply.status in (400, 422) else "chat"

    def _text_of_bos(self) -> str:
        """The token that a text begins with, as text; "" where there is none."""
        if self._spec.bos_token_id is None:
            return ""
        reply = self._http.post(DETOKENIZE, {"model": self.model, "tokens": [self._spec.bos_token_id]})
        return str(reply.body.get("prompt", ""))

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`. Closing the iterator closes the connection, and the server stops.

        Raises:
            PromptError: also where the prompt and its answer are longer than the server's context, or the way is
                "chat" and images have different counts or the server makes other token ids of the text.
        """
        check_prompt(prompt, self._spec)
        check_sampling(sampling)
        if self._closed:
            raise EnvironmentFaultError("the decoder is closed.")
        check_room(prompt, sampling, self.context)
        path, body = self._request(prompt, sampling)
        return self._tokens(path, body, prompt, sampling)

    def _request(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> tuple[str, dict[str, Any]]:
        """(path, body)."""
        settings = asdict(vllm_sampling(self._spec, sampling))
        both = {"model": self.model, "stream": True, "return_token_ids": True}
        if self.way == "tokens":
            return GENERATE, {**both, **_ids_and_rows(prompt), "sampling_params": {**settings, "detokenize": False}}
        if not len(prompt.rows):
            return COMPLETIONS, {**both, **settings, "prompt": prompt.input_ids.tolist()}
        return CHAT, {**both, **settings, **self._verbatim(prompt)}

    def _verbatim(self, prompt: StitchedPrompt) -> dict[str, Any]:
        """The prompt's text as it is, without the placeholders of images that have no rows, and the other images."""
        images = rows_of_images(prompt)
        if len({len(rows) for rows in images}) > 1:
            raise PromptError(
                f"the images have {', '.join(str(len(rows)) for rows in images)} rows, and where counts differ this "
                f"vLLM server's engine would end.",
                hint=f"Give all images one budget. Or: {_FLAGS}",
            )
        if len(images) != len(prompt.counts):
            raise PromptError("an image has no rows, and this vLLM server takes the prompt as text.", hint=_FLAGS)
        return {
            "messages": _message(prompt.text, [npy_base64(rows) for rows in images]),
            "chat_template": _VERBATIM,
            # a text that begins with the BOS token gets no second one, as in `PromptEncoder.ids_from_text`
            "add_special_tokens": not (self._bos and prompt.text.startswith(self._bos)),
        }

    def _tokens(
        self, path: str, body: dict[str, Any], prompt: StitchedPrompt, sampling: SamplingSettings
    ) -> Iterator[int]:
        ends, compared, reason, left = end_tokens(self._spec, sampling), False, None, sampling.max_new_tokens
        events = self._http.events(path, body)
        try:
            for event in events:
                choice = (event.get("choices") or [{}])[0]
                if not compared:
                    self._compare(event.get("prompt_token_ids") or choice.get("prompt_token_ids"), prompt)
                    compared = True
                for token in choice.get("token_ids") or ():
                    if token in ends:  # the server gives the token that ends an answer as well
                        return
                    yield int(token)
                    left -= 1
                reason = choice.get("finish_reason") or reason
        except UsageError as error:
            raise self._explained(error) from error
        finally:
            events.close()  # type: ignore[attr-defined]
        if reason not in ("stop", "length") or (reason == "length" and left > 0):
            raise EnvironmentFaultError(f"the vLLM server at {self._http.address} ended the answer early: {reason}.")

    def _compare(self, ids: object, prompt: StitchedPrompt) -> None:
        """Refuse an answer to another prompt."""
        if ids != prompt.input_ids.tolist():
            seen = f"{len(ids)}" if isinstance(ids, list) else "no"
            raise PromptError(
                f"the vLLM server at {self._http.address} answers to another prompt: {seen} token ids, not the "
                f"{len(prompt)} that were meant.",
                hint=_FLAGS if self.way == "chat" else "Serve the checkpoint that the bundle was exported from.",
            )

    def _explained(self, error: UsageError) -> UsageError | EnvironmentFaultError:
        """The same error, or the setting that the server lacks."""
        if "trust-request-chat-template" not in error.message:
            return error
        return EnvironmentFaultError(
            f"the vLLM server at {self._http.address} takes neither token ids with rows nor a prompt as it is.",
            hint=_FLAGS,
        )

    def close(self) -> None:
        """Nothing is held between answers."""
        self._closed = True


def _message(text: str, rows: list[str]) -> list[dict[str, Any]]:
    """One user's message of images, in base64, and a text with their placeholders."""
    images = [{"type": "image_embeds", "image_embeds": row} for row in rows]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def _ids_and_rows(prompt: StitchedPrompt) -> dict[str, Any]:
    """Source of the names: vLLM 0.32 vllm/entrypoints/scale_out/token_in_token_out/protocol.py (`GenerateRequest`)."""
    fields: dict[str, Any] = {"token_ids": prompt.input_ids.tolist()}
    items = items_from_prompt(prompt)
    if items:
        kind = "prompt_embeds"
        fields["features"] = {
            "mm_hashes": {kind: [item.digest for item in items]},
            "mm_placeholders": {kind: [{"offset": item.offset, "length": len(item.rows)} for item in items]},
            "kwargs_data": {kind: [wire_base64(item.rows) for item in items]},
        }
    return fields
