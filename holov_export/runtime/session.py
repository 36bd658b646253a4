"""A question about an image, answered from a bundle.

image --preprocess--> PixelBatch --runner, budget--> VisualTokens --stitch--> StitchedPrompt --decoder--> Generation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from holov_export.bundle import Bundle, open_bundle
from holov_export.errors import EnvironmentFaultError, PromptError
from holov_export.runtime.decoder import Decoder, check_sampling, decoder_maker
from holov_export.runtime.preprocess import ImageSource, pixels_from_images
from holov_export.runtime.runner import Runner, chosen_budget, default_budget, quota_array
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.runtime.stitch import PromptEncoder, prompt_encoder_from_tokenizer, stitch
from holov_export.runtime.text_stream import TextStream
from holov_export.tensors import (
    FloatArray,
    Generation,
    PixelBatch,
    SamplingSettings,
    StitchedPrompt,
    Timings,
    VisualTokens,
)

if TYPE_CHECKING:
    from typing_extensions import Self

GREEDY = SamplingSettings()
Images = ImageSource | Sequence[ImageSource]


@dataclass(frozen=True)
class _Prepared:
    """Images that can go into the vision graph, and how many seconds preprocessing them took."""

    pixels: PixelBatch
    budget: int
    quota: Sequence[int] | None
    seconds: float


@dataclass(frozen=True)
class _Stages:
    """perf_counter seconds of the stages before decoding."""

    preprocess: float
    vision: float


class Session:
    """An opened bundle, ready to answer. A context manager, for one thread at a time.

    Attributes:
        bundle: the opened bundle.
    """

    def __init__(self, bundle: Bundle, runner: Runner, make_decoder: Callable[[], Decoder]) -> None:
        """Put a session together from parts; `Session.open` is the usual way. `make_decoder` is called when needed."""
        self.bundle = bundle
        self._runner = runner
        self._make_decoder = make_decoder
        self._decoder: Decoder | None = None
        self._encoder: PromptEncoder | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        method: str | None = None,
        decoder: str | Decoder = "genai",
        engine: str = "ort",
        target: str | None = None,
        provider: str = "auto",
        threads: int | None = None,
        verify: Literal["full", "size"] = "full",
        checkpoint: str | Path | None = None,
        runner: Runner | None = None,
    ) -> Session:
        """Open a bundle.

        Args:
            bundle: its folder, or one that `open_bundle` has opened.
            method: which of its vision graphs runs, as `bundle.methods` names them; None for the default one.
            decoder: "genai" (embedded in the bundle), "hf" (transformers, needs `checkpoint`), "none", or your own.
                It is loaded when the first answer is asked for.
            engine: of the vision graph: "ort" (ONNX Runtime) or "tensorrt" (the bundle's compiled engine).
            target: for "tensorrt": which compiled engine; None for the only one that fits this machine.
            provider: "cpu", "cuda" or "auto", of the decoder and of "ort"; "tensorrt" for "ort" alone.
            threads: CPU threads within one operator; None for the back ends' choice.
            verify: "full" checks every file's sha256, "size" only sizes.
            checkpoint: directory of the checkpoint, for "hf".
            runner: of the vision graph, instead of `engine`.

        Raises:
            BundleError, IntegrityError: see `open_bundle`.
            UnknownNameError: no such method, decoder, engine or provider.
            EngineError: no compiled engine fits this machine.
            EnvironmentFaultError: this machine lacks what was asked for.
        """
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=verify)
        opened = opened if method is None else opened.of_method(method)
        # the TensorRT provider is one for the vision graph; decoders have none
        make_decoder = decoder_maker(
            decoder, opened, "auto" if provider == "tensorrt" else provider, threads, checkpoint
        )
        runner = runner or runner_from_bundle(
            opened, engine=engine, target=target, provider=provider, threads=threads, verify=verify
        )
        return cls(opened, runner, make_decoder)

    @property
    def default_budget(self) -> int:
        """Tokens of an image when no budget is given: the bundle's own, or a ninth of all."""
        return default_budget(self.bundle.manifest.plan)

    @property
    def name(self) -> str:
        """The engines at work, for people; loads the decoder."""
        return f"{self._runner.name}, {self.decoder.name}"

    @property
    def decoder(self) -> Decoder:
        """The decoder, loaded on first use.

        Raises:
            EnvironmentFaultError: the session is closed, or this machine cannot load it.
        """
        self._check_open()
        if self._decoder is None:
            self._decoder = self._make_decoder()
        return self._decoder

    @property
    def encoder(self) -> PromptEncoder:
        """The tokenizer and chat template, loaded on first use."""
        if self._encoder is None:
            self._encoder = prompt_encoder_from_tokenizer(self.bundle.tokenizer, self.bundle.manifest.plan.model)
        return self._encoder

    def see(self, images: Images, budget: int | None = None, quota: Sequence[int] | None = None) -> VisualTokens:
        """The visual tokens of some images, with the saliency of all N. Needs neither tokenizer nor decoder.

        Args, Raises: as of `ask`.
        """
        return self._see(self._prepared(_listed(images), budget, quota), saliency=True)[0]

    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        budget: int | None = None,
        quota: Sequence[int] | None = None,
        sampling: SamplingSettings = GREEDY,
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer a question about one image or several.

        Args:
            images: one, or a list of those that the prompt is about.
            prompt: a question.
            budget: tokens of each image, 1..N; None for the largest quota, without quotas for `default_budget`.
            quota: tokens of each single image, 1..budget.
            sampling: how tokens are drawn; greedy by default.
            raw: `prompt` is the whole prompt with a placeholder for each image, passed on verbatim.
            on_text: is called with each piece of the answer's text as it is made.

        Raises:
            ImageError, BudgetError, PromptError, UsageError: the request is wrong.
        """
        (answer,) = self.ask_batch(
            [_listed(images)], [prompt], budget=budget, quota=quota, sampling=sampling, raw=raw, on_text=on_text
        )
        return answer

    def ask_batch(
        self,
        images: Sequence[Images],
        prompts: Sequence[str],
        *,
        budget: int | None = None,
        quota: Sequence[int] | None = None,
        sampling: SamplingSettings = GREEDY,
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Generation]:
        """Answer several prompts: one run of the vision graph for all images, then one decoding after the other.

        The decoders take one prompt at a time because GenAI's vision-language pipeline does, so a batch saves time in
        the vision graph only. Each answer's timings hold the whole batch's preprocessing and vision.

        Args:
            images: for each prompt its image or its list of images.
            prompts: one question each.
            budget: tokens of each image, 1..N; None for the largest quota, without quotas for `default_budget`.
            quota: tokens of each single image, over all prompts in order.
            sampling: how tokens are drawn; greedy by default.
            raw: the prompts are whole prompts, passed on verbatim.
            on_text: is called with each piece of each answer's text as it is made.

        Raises:
            ImageError, BudgetError, PromptError, UsageError: the request is wrong.
        """
        groups = [_listed(group) for group in images]
        if len(groups) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts and images for {len(groups)}.", hint="Give as many.")
        self._check_open()
        check_sampling(sampling)
        texts = [self._text(prompt, len(group), raw) for prompt, group in zip(prompts, groups, strict=True)]
        prepared = self._prepared([image for group in groups for image in group], budget, quota)
        for text, group in zip(texts, groups, strict=True):
            self._check_prompt(text, len(group))
        self.decoder  # noqa: B018  gigabytes, so only for a request that is sound; and it is no stage of an answer
        visual, stages = self._see(prepared, saliency=False)
        rows = iter([visual.rows(index) for index in range(len(visual))])
        return [
            self._answer(text, [next(rows) for _ in group], sampling, stages, on_text)
            for text, group in zip(texts, groups, strict=True)
        ]

    def answer(
        self, rows: Sequence[FloatArray], prompt: str, *, sampling: SamplingSettings = GREEDY, raw: bool = False
    ) -> Generation:
        """Answer from rows that `see` or a runner has made: several questions about an image that is seen once.

        Args:
            rows: float [count, D] of each image.
            prompt, sampling, raw: as of `ask`.

        Returns:
            an answer whose timings begin at the stitching.

        Raises:
            PromptError, UsageError: the request is wrong.
        """
        self._check_open()
        check_sampling(sampling)
        text = self._text(prompt, len(rows), raw)
        self.decoder  # noqa: B018  loading it is no stage of an answer
        return self._answer(text, rows, sampling, _Stages(preprocess=0.0, vision=0.0), None)

    def _text(self, prompt: str, images: int, raw: bool) -> str:
        if raw and not prompt.strip():
            raise PromptError("the prompt is empty.")
        return prompt if raw else self.encoder.text_from_question(prompt, images=images)

    def _check_prompt(self, text: str, images: int) -> None:
        """Refuse a prompt that could not be stitched even if a single token of each image were kept."""
        fewest = np.zeros((1, self.encoder.decoder.width), dtype=np.float32)
        stitch(self.encoder, text, [fewest] * images, max_new_tokens=1)

    def _prepared(self, images: Sequence[ImageSource], budget: int | None, quota: Sequence[int] | None) -> _Prepared:
        self._check_open()
        budget = chosen_budget(budget, quota, self._runner.tokens, self.default_budget)
        quota_array(quota, budget, len(images))
        began = perf_counter()
        pixels = pixels_from_images(images, self.bundle.manifest.plan.model.image)
        return _Prepared(pixels, budget, quota, perf_counter() - began)

    def _see(self, prepared: _Prepared, *, saliency: bool) -> tuple[VisualTokens, _Stages]:
        began = perf_counter()
        visual = self._runner.run(prepared.pixels, prepared.budget, prepared.quota, saliency=saliency)
        return visual, _Stages(preprocess=prepared.seconds, vision=perf_counter() - began)

    def _answer(
        self,
        text: str,
        rows: Sequence[FloatArray],
        sampling: SamplingSettings,
        stages: _Stages,
        on_text: Callable[[str], None] | None,
    ) -> Generation:
        began = perf_counter()
        prompt = stitch(self.encoder, text, rows, max_new_tokens=1)
        sampling = _within_context(sampling, self.encoder.decoder.context - len(prompt))
        stitched = perf_counter()
        answer = _decoded(self.decoder, prompt, sampling, TextStream(self.encoder.tokenizer, sampling.stop), on_text)
        ended = perf_counter()
        return Generation(
            text=answer.text,
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            prompt_tokens=len(prompt),
            visual_tokens=prompt.counts,
            timings=Timings(
                preprocess=stages.preprocess,
                vision=stages.vision,
                stitch=stitched - began,
                setup=answer.ready - stitched,
                prefill=answer.first - answer.ready,
                decode=ended - answer.first,
            ),
        )

    def close(self) -> None:
        """Release the engines, those given to `open` as well. A closed session answers no more."""
        self._closed = True
        self._runner.close()
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def _check_open(self) -> None:
        if self._closed:
            raise EnvironmentFaultError("the session is closed.", hint="Open the bundle again.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Decoded:
    """What a decoder gave; perf_counter times when it was ready to prefill and when the first token was there."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    ready: float
    first: float


def _decoded(
    decoder: Decoder,
    prompt: StitchedPrompt,
    sampling: SamplingSettings,
    stream: TextStream,
    on_text: Callable[[str], None] | None,
) -> _Decoded:
    """Run the decoder to the end, to a stop string, or to `max_new_tokens`."""
    pieces: list[str] = []

    def give(piece: str) -> None:
        pieces.append(piece)
        if piece and on_text is not None:
            on_text(piece)

    ids: list[int] = []
    first: float | None = None
    tokens = decoder.stream(prompt, sampling)
    ready = perf_counter()
    for token in tokens:
        first = perf_counter() if first is None else first
        give(stream.push(token))
        if stream.stopped:
            break
        ids.append(token)
    give(stream.finish())
    reason = "length" if len(ids) >= sampling.max_new_tokens and not stream.stopped else "stop"
    return _Decoded("".join(pieces), tuple(ids), reason, ready, perf_counter() if first is None else first)


def _within_context(sampling: SamplingSettings, room: int) -> SamplingSettings:
    """The same settings with an answer no longer than the context has room for."""
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def _listed(images: Images) -> list[ImageSource]:
    """One image as a list of one. Bytes and paths are sequences too, but one image."""
    if isinstance(images, (str, Path, bytes, Image.Image, np.ndarray)):
        return [images]
    return list(images)
