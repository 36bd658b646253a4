"""A question about images and clips, answered from a bundle.

image --preprocess--> PixelBatch --runner, budget--> VisualTokens --stitch--> StitchedPrompt --decoder--> Generation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from holov_export.bundle import Bundle, open_bundle
from holov_export.errors import BundleError, EnvironmentFaultError, PromptError, UsageError
from holov_export.runtime.answer_stream import AnswerStream, EarlierStages
from holov_export.runtime.decoder import Decoder, check_sampling
from holov_export.runtime.decoder_choice import DecoderOptions, decoder_maker
from holov_export.runtime.media import Media, MediaBatch, Part, PreparedMedia, Seen, media_from_groups, regions_of
from holov_export.runtime.ort_providers import decoder_provider
from holov_export.runtime.packing import Spread
from holov_export.runtime.preprocess import ImageSource
from holov_export.runtime.preprocess_video import VideoSource
from holov_export.runtime.runner import Runner, default_budget
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.runtime.stitch import PromptEncoder, check_fit, prompt_encoder_from_tokenizer, stitch
from holov_export.tensors import (
    FloatArray,
    Generation,
    ImageRows,
    SamplingSettings,
    VisualTokens,
)

if TYPE_CHECKING:
    from typing_extensions import Self

GREEDY = SamplingSettings()
NOTHING_BEFORE = EarlierStages()
Images = ImageSource | Sequence[ImageSource]


class Session:
    """An opened bundle, ready to answer. A context manager, for one thread at a time.

    Attributes:
        bundle: the opened bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        runner: Runner | None,
        make_decoder: Callable[[], Decoder],
        make_runner: Callable[[Bundle], Runner] | None = None,
    ) -> None:
        """Put a session together from parts; `Session.open` is the usual way.

        Args:
            runner: of the graph of images; None lets `make_runner` make it when the first image comes.
            make_decoder: is called when the first answer is asked for.
            make_runner: makes the runner of one of the bundle's graphs when it is needed.
        """
        self.bundle = bundle
        self._runners: dict[Part, Runner] = {} if runner is None else {bundle.part: runner}
        self._make_decoder = make_decoder
        self._make_runner = make_runner
        self._decoder: Decoder | None = None
        self._encoder: PromptEncoder | None = None
        self._newline: FloatArray | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        method: str | None = None,
        decoder: str | Decoder = "auto",
        engine: str = "ort",
        target: str | None = None,
        provider: str = "auto",
        threads: int | None = None,
        verify: Literal["full", "size"] = "full",
        checkpoint: str | Path | None = None,
        decoder_options: DecoderOptions | None = None,
        runner: Runner | None = None,
    ) -> Session:
        """Open a bundle.

        Args:
            bundle: its folder, or one that `open_bundle` has opened.
            method: which of its vision graphs runs, as `bundle.methods` names them; None for the default one.
            decoder: "auto" (embedded in the bundle, by the back end that suits it), "genai" or "ort" (ONNX Runtime
                GenAI or plain ONNX Runtime over the embedded one), another of `decoder_choice.DECODERS`, "none", or
                your own. It is loaded when the first answer is asked for.
            engine: of the vision graph: "ort" (ONNX Runtime) or "tensorrt" (the bundle's compiled engine).
            target: for "tensorrt": which compiled engine; None for the only one that fits this machine.
            provider: "cpu", "cuda" or "auto", of the decoder and of "ort"; "tensorrt" for "ort" alone.
            threads: CPU threads within one operator; None for the back ends' choice.
            verify: "full" checks every file's sha256, "size" only sizes.
            checkpoint: directory of the checkpoint, for decoders that load it themselves.
            decoder_options: what further decoders need; provider, threads, verify and checkpoint are those above.
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
        options = replace(
            decoder_options or DecoderOptions(),
            provider=decoder_provider(provider),
            threads=threads,
            verify=verify,
            checkpoint=None if checkpoint is None else Path(checkpoint),
        )
        make_decoder = decoder_maker(decoder, opened, options)

        def make_runner(view: Bundle) -> Runner:
            return runner_from_bundle(
                view, engine=engine, target=target, provider=provider, threads=threads, verify=verify
            )

        if runner is None and len(opened.manifest.plan.parts) == 1:  # of two towers only one may be needed
            runner = make_runner(opened)
        return cls(opened, runner, make_decoder, make_runner)

    @property
    def default_budget(self) -> int:
        """Tokens of an image when no budget is given: the bundle's own, or a ninth of all."""
        return default_budget(self.bundle.manifest.plan)

    @property
    def name(self) -> str:
        """The engines at work, for people; loads the decoder."""
        return f"{self._runner(self.bundle.part).name}, {self.decoder.name}"

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

    @property
    def newline(self) -> FloatArray | None:
        """float32 [D]: what follows the rows of an image in a prompt; None where nothing does."""
        path = self.bundle.newline
        if self._newline is None and path is not None:
            try:
                self._newline = np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise BundleError(f"{path.name} does not load: {error}.", hint="Export the bundle again.") from error
        return self._newline

    def see(
        self,
        images: Images = (),
        budget: int | None = None,
        quota: Sequence[int] | None = None,
        *,
        videos: Sequence[VideoSource] = (),
        spread: Spread = "frames",
    ) -> VisualTokens:
        """The visual tokens of some images or clips, with the saliency of all N. Needs no tokenizer and no decoder.

        Args, Raises: as of `ask`; UsageError if images and clips go into different graphs.
        """
        prepared = self._prepared([Media(_listed(images), videos)], budget, quota, spread)
        if len(prepared.batches) != 1:
            raise UsageError("images and clips go into different graphs here.", hint="Ask for them one at a time.")
        return self._run(prepared.batches[0], spread, saliency=True)

    def rows_of(
        self,
        images: Images = (),
        videos: Sequence[VideoSource] = (),
        *,
        budget: int | None = None,
        quota: Sequence[int] | None = None,
        spread: Spread = "frames",
    ) -> tuple[list[ImageRows], list[ImageRows]]:
        """The rows of images and of clips as `answer` takes them: for several questions about what is seen once.

        Args, Raises: as of `ask`.
        """
        pictures = _listed(images)
        found, _ = self._see(self._prepared([Media(pictures, videos)], budget, quota, spread))
        return found[: len(pictures)], found[len(pictures) :]

    def see_groups(
        self, groups: Sequence[Media], quota: Sequence[int], *, spread: Spread = "frames"
    ) -> tuple[list[Seen], EarlierStages]:
        """What is seen of the images and clips of several prompts, in one run of each vision graph that they need.

        Args:
            groups: those of each prompt; a prompt may have none.
            quota: tokens of each image and clip, over all prompts in order, a prompt's images before its clips; what
                has fewer keeps all.
            spread: as of `ask`.

        Returns:
            (one for each prompt, the seconds that preprocessing and the vision graphs took for all of them)

        Raises:
            ImageError, BudgetError, UsageError: the request is wrong.
        """
        self._check_open()
        if not any(group.images or group.videos for group in groups):
            return [Seen((), (), ()) for _ in groups], NOTHING_BEFORE
        prepared = self._prepared(groups, None, quota, spread)
        regions = regions_of(prepared, self.bundle.manifest.plan.model)
        rows, stages = self._see(prepared)
        seen, first = [], 0
        for group in groups:
            videos = first + len(group.images)
            end = videos + len(group.videos)
            seen.append(Seen(tuple(rows[first:videos]), tuple(rows[videos:end]), tuple(regions[first:end])))
            first = end
        return seen, stages

    def ask(
        self,
        images: Images,
        prompt: str,
        *,
        videos: Sequence[VideoSource] = (),
        budget: int | None = None,
        quota: Sequence[int] | None = None,
        spread: Spread = "frames",
        sampling: SamplingSettings = GREEDY,
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer a question about images, clips or both.

        Args:
            images: one, or a list of those that the prompt is about.
            prompt: a question.
            videos: the clips that it is about; the model puts them behind the images, unless the prompt has
                placeholders. A string is a path, so a single one must be in a list.
            budget: tokens of each image and of each clip, 1..N; what has fewer keeps all. None for the largest quota,
                without quotas for `default_budget` or, where images differ in size, a ninth of each one's own.
            quota: tokens of each single image and then of each clip, 1..budget.
            spread: of clips: "frames" for equal quotas of all frames, "clip" for one quota of all of them.
            sampling: how tokens are drawn; greedy by default.
            raw: `prompt` is the whole prompt with a placeholder for each image, passed on verbatim.
            on_text: is called with each piece of the answer's text as it is made.

        Raises:
            ImageError, BudgetError, PromptError, UsageError: the request is wrong.
        """
        (answer,) = self.ask_batch(
            [Media(_listed(images), videos)],
            [prompt],
            budget=budget,
            quota=quota,
            spread=spread,
            sampling=sampling,
            raw=raw,
            on_text=on_text,
        )
        return answer

    def ask_batch(
        self,
        images: Sequence[Images | Media],
        prompts: Sequence[str],
        *,
        budget: int | None = None,
        quota: Sequence[int] | None = None,
        spread: Spread = "frames",
        sampling: SamplingSettings = GREEDY,
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Generation]:
        """Answer several prompts: one run of the vision graph for all images, then one decoding after the other.

        A batch saves time in the vision graph only; `answer_stream` makes several answers in turn. Each answer's
        timings hold the whole batch's preprocessing and vision.

        Args:
            images: for each prompt its image, its list of images, or its `Media`. They may differ in size.
            prompts: one question each.
            budget, spread: as of `ask`.
            quota: tokens of each single image and clip, over all prompts in order, a prompt's images before its clips.
            sampling: how tokens are drawn; greedy by default.
            raw: the prompts are whole prompts, passed on verbatim.
            on_text: is called with each piece of each answer's text as it is made.

        Raises:
            ImageError, BudgetError, PromptError, UsageError: the request is wrong.
        """
        groups = [group if isinstance(group, Media) else Media(_listed(group)) for group in images]
        if len(groups) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts and images for {len(groups)}.", hint="Give as many.")
        self._check_open()
        check_sampling(sampling)
        texts = [
            self._text(prompt, len(group.images), len(group.videos), raw)
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        prepared = self._prepared(groups, budget, quota, spread)
        for text, group in zip(texts, groups, strict=True):
            check_fit(self.encoder, text, images=len(group.images), videos=len(group.videos))
        self.decoder  # noqa: B018  gigabytes, so only for a request that is sound; and it is no stage of an answer
        seen, stages = self._see(prepared)
        rows = iter(seen)
        return [
            self._answer(
                text,
                [next(rows) for _ in group.images],
                [next(rows) for _ in group.videos],
                sampling,
                stages,
                on_text,
            )
            for text, group in zip(texts, groups, strict=True)
        ]

    def answer(
        self,
        rows: Sequence[FloatArray | ImageRows],
        prompt: str,
        *,
        videos: Sequence[ImageRows] = (),
        sampling: SamplingSettings = GREEDY,
        raw: bool = False,
    ) -> Generation:
        """Answer from rows that `rows_of` or a runner has made: several questions about what is seen once.

        Args:
            rows: of each image: as `rows_of` gives them, or float [count, D] where all images have the same grid.
            videos: those of clips.
            prompt, sampling, raw: as of `ask`.

        Returns:
            an answer whose timings begin at the stitching.

        Raises:
            PromptError, UsageError: the request is wrong.
        """
        stream = self.answer_stream(rows, prompt, videos=videos, sampling=sampling, raw=raw)
        for _ in stream:
            pass
        return stream.generation()

    def answer_stream(
        self,
        rows: Sequence[FloatArray | ImageRows],
        prompt: str,
        *,
        videos: Sequence[ImageRows] = (),
        sampling: SamplingSettings = GREEDY,
        raw: bool = False,
        stages: EarlierStages = NOTHING_BEFORE,
    ) -> AnswerStream:
        """The same as `answer`, one token a step: several can be open at once, as many as the decoder has lanes.

        Args:
            stages: what the answer's timings begin with.
        """
        self._check_open()
        check_sampling(sampling)
        text = self._text(prompt, len(rows), len(videos), raw)
        self.decoder  # noqa: B018  loading it is no stage of an answer
        return self._stream(text, rows, videos, sampling, stages)

    def _text(self, prompt: str, images: int, videos: int, raw: bool) -> str:
        if raw and not prompt.strip():
            raise PromptError("the prompt is empty.")
        return prompt if raw else self.encoder.text_from_question(prompt, images=images, videos=videos)

    def _prepared(
        self, groups: Sequence[Media], budget: int | None, quota: Sequence[int] | None, spread: Spread
    ) -> PreparedMedia:
        self._check_open()
        return media_from_groups(groups, self.bundle.manifest.plan, budget, quota, spread)

    def _see(self, prepared: PreparedMedia) -> tuple[list[ImageRows], EarlierStages]:
        """The rows of each image and clip, in the order of the prompts."""
        began = perf_counter()
        found: dict[int, ImageRows] = {}
        for batch in prepared.batches:
            visual = self._run(batch, prepared.spread, saliency=False)
            for index, owner in enumerate(batch.owners):
                found[owner] = visual.of_image(index, batch.pixels)
        stages = EarlierStages(preprocess=prepared.seconds, vision=perf_counter() - began)
        return [found[index] for index in sorted(found)], stages

    def _run(self, batch: MediaBatch, spread: Spread, *, saliency: bool) -> VisualTokens:
        runner, budget = self._runner(batch.part), max(batch.quota)
        if not batch.pixels.layouts:
            return runner.run(batch.pixels, min(budget, runner.tokens), batch.quota, saliency=saliency)
        return runner.run(batch.pixels, min(budget, runner.tokens), batch.quota, saliency=saliency, spread=spread)

    def _runner(self, part: Part) -> Runner:
        if part not in self._runners:
            if self._make_runner is None:
                raise UsageError(f"this session was put together without a runner for {part}s.")
            self._runners[part] = self._make_runner(self.bundle.of_part(part))
        return self._runners[part]

    def _answer(
        self,
        text: str,
        rows: Sequence[FloatArray | ImageRows],
        videos: Sequence[ImageRows],
        sampling: SamplingSettings,
        stages: EarlierStages,
        on_text: Callable[[str], None] | None,
    ) -> Generation:
        stream = self._stream(text, rows, videos, sampling, stages)
        try:
            for piece in stream:
                if piece and on_text is not None:
                    on_text(piece)
        finally:
            stream.close()
        return stream.generation()

    def _stream(
        self,
        text: str,
        rows: Sequence[FloatArray | ImageRows],
        videos: Sequence[ImageRows],
        sampling: SamplingSettings,
        stages: EarlierStages,
    ) -> AnswerStream:
        began = perf_counter()
        prompt = stitch(
            self.encoder,
            text,
            rows,
            videos,
            newline=self.newline,
            start_counts=self.bundle.manifest.plan.start_counts,
            max_new_tokens=1,
        )
        used = max(len(prompt), prompt.next_position or 0)
        sampling = _within_context(sampling, self.encoder.decoder.context - used)
        stages = replace(stages, stitch=perf_counter() - began)
        return AnswerStream(self.decoder, prompt, sampling, self.encoder.tokenizer, stages)

    def close(self) -> None:
        """Release the engines, those given to `open` as well. A closed session answers no more."""
        self._closed = True
        for runner in self._runners.values():
            runner.close()
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


def _within_context(sampling: SamplingSettings, room: int) -> SamplingSettings:
    """The same settings with an answer no longer than the context has room for."""
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def _listed(images: Images) -> list[ImageSource]:
    """One image as a list of one. Bytes and paths are sequences too, but one image."""
    if isinstance(images, (str, Path, bytes, Image.Image, np.ndarray)):
        return [images]
    return list(images)
