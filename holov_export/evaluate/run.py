"""Ask what is not answered yet.

For each rule one graph is loaded, each picture is preprocessed once and run once per budget, and all its questions are
decoded from those rows. The decoder is loaded once for all rules, except for rules that prune inside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holov_export.bundle import MANIFEST, Bundle
from holov_export.errors import ImageError, PromptError, UsageError
from holov_export.evaluate.data import Dataset, Picture, Question
from holov_export.evaluate.inner import RefetchingDecoder, decoder_from_method
from holov_export.evaluate.journal import Journal, JournalEntry, JournalHeader
from holov_export.evaluate.plan import Cell, Plan
from holov_export.runtime.decoder import Decoder
from holov_export.runtime.decoder_choice import DecoderOptions, decoder_maker, embedded_decoder
from holov_export.runtime.ort_providers import decoder_provider
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.runner import Runner
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.runtime.session import Session
from holov_export.runtime.stitch import prompt_encoder_from_tokenizer
from holov_export.spec import ExportPlan, TiledImageSpec
from holov_export.storage import sha256_of
from holov_export.tensors import ImageRows, PixelBatch, SamplingSettings, StitchedPrompt

#: hears what is being done
Tell = Callable[[str], None]
#: hears that so many questions are answered
Advance = Callable[[int], None]


@dataclass(frozen=True)
class AskSettings:
    """How questions are asked.

    Attributes:
        decoder: "auto", "genai", "ort" or "hf"; checkpoint: directory of the weights, for "hf".
        provider: of ONNX Runtime, and of the decoder where it has that.
        threads: CPU threads, None for the back ends' choice.
        suffix: a line after every question, "" for none.
        max_new_tokens: longest answer.
    """

    decoder: str = "auto"
    checkpoint: Path | None = None
    provider: str = "auto"
    threads: int | None = None
    suffix: str = ""
    max_new_tokens: int = 32

    def prompt(self, question: Question) -> str:
        """The words that the model is asked."""
        return f"{question.text}\n{self.suffix}" if self.suffix else question.text

    @property
    def decoder_provider(self) -> str:
        """The TensorRT provider is one for the vision graph; decoders have none."""
        return decoder_provider(self.provider)

    def back_end(self, bundle: Bundle) -> str:
        """What decodes: "genai", "ort" or "hf".

        Raises:
            UsageError: "genai" for a language model that it would run wrongly.
        """
        spec = bundle.manifest.plan.model.decoder
        return self.decoder if self.decoder == "hf" else embedded_decoder(self.decoder, spec)

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(max_new_tokens=self.max_new_tokens)


class LentDecoder:
    """A decoder that several sessions use one after the other: closing one of them does not close it."""

    def __init__(self, decoder: Decoder) -> None:
        self.name, self.lanes = decoder.name, decoder.lanes
        self._decoder = decoder

    def stream(self, prompt: StitchedPrompt, sampling: SamplingSettings) -> Iterator[int]:
        """See `Decoder.stream`."""
        return self._decoder.stream(prompt, sampling)

    def close(self) -> None:
        """Nothing: who lent it closes it."""


@contextmanager
def shared_decoder(bundle: Bundle, settings: AskSettings) -> Iterator[Callable[[], Decoder]]:
    """Gives the decoder, loaded when it is asked for first and closed at the end."""
    options = DecoderOptions(settings.decoder_provider, settings.threads, settings.checkpoint)
    make = decoder_maker(settings.decoder, bundle, options)
    made: list[Decoder] = []

    def lent() -> Decoder:
        if not made:
            made.append(make())
        return LentDecoder(made[0])

    try:
        yield lent
    finally:
        for decoder in made:
            decoder.close()


@dataclass(frozen=True)
class Seen:
    """A picture as the decoder gets it.

    Attributes:
        rows: of one picture. entering: visual tokens that enter the language model; None for all that its prompt has.
    """

    rows: list[ImageRows]
    entering: int | None = None


@dataclass(frozen=True)
class Opened:
    """The graph of a cell, and a session that decodes what comes out of it."""

    runner: Runner
    session: Session

    def see(self, pixels: PixelBatch, cell: Cell) -> Seen:
        """Run one picture through the graph."""
        tokens = pixels.layouts[0].tokens if pixels.layouts else self.runner.tokens
        visual = self.runner.run(pixels, cell.kept_of(tokens), saliency=False)
        rows = [visual.of_image(0, pixels)]
        decoder = self.session.decoder
        if not isinstance(decoder, RefetchingDecoder):
            return Seen(rows)
        kept = self.runner.run(pixels, cell.budget, saliency=False)
        decoder.kept = kept.positions[0]
        return Seen(rows, int(kept.counts[0]))


@contextmanager
def opened_cell(bundle: Bundle, cell: Cell, settings: AskSettings, lent: Callable[[], Decoder]) -> Iterator[Opened]:
    """Load the graph of a cell, with the shared decoder, or with the cell's own if its rule needs one."""
    view = bundle.of_method(cell.graph)
    spec = bundle.manifest.plan.model.decoder

    def make() -> Decoder:
        if not cell.inner:
            return lent()
        assert settings.checkpoint is not None
        return decoder_from_method(
            settings.checkpoint,
            spec,
            cell.method,
            cell.budget,
            provider=settings.decoder_provider,
            threads=settings.threads,
        )

    runner = runner_from_bundle(view, provider=settings.provider, threads=settings.threads, verify="size")
    with Session(view, runner, make) as session:
        yield Opened(runner, session)


def header_of(bundle: Bundle, dataset: Dataset, settings: AskSettings) -> JournalHeader:
    """What the journal of a run says of itself."""
    config = settings.checkpoint / "config.json" if settings.checkpoint is not None else None
    return JournalHeader(
        data=dataset.sha256,
        manifest=sha256_of(bundle.folder / MANIFEST),
        decoder=settings.back_end(bundle),
        provider=settings.provider,
        checkpoint=sha256_of(config) if config is not None and config.is_file() else "",
        suffix=settings.suffix,
        max_new_tokens=settings.max_new_tokens,
    )


def check_prompts(bundle: Bundle, dataset: Dataset, settings: AskSettings) -> None:
    """Refuse questions that do not fit into the context with all N tokens of the largest picture.

    Raises:
        PromptError: names the first one.
        MissingExtraError, BundleError: the tokenizer cannot be loaded.
    """
    plan = bundle.manifest.plan
    encoder = prompt_encoder_from_tokenizer(bundle.tokenizer, plan.model)
    rows = plan.model.image_tokens + most_newlines(plan)
    room = plan.model.decoder.context - rows  # they take one placeholder's place, one new token follows
    for question in dataset.questions:
        try:
            text = encoder.text_from_question(settings.prompt(question))
        except PromptError as error:
            raise PromptError(f"{question.where}: {error.message}", hint=error.hint) from error
        length = len(encoder.ids_from_text(text))
        if length > room:
            raise PromptError(
                f"{question.where}: the question has {length} tokens with its prompt, and beside the "
                f"{rows} of the {'largest ' if plan.packed else ''}picture there is room for {room}.",
                hint="Shorten the question, or take it out.",
            )


def most_newlines(plan: ExportPlan) -> int:
    """Newline embeddings of the tallest picture."""
    image = plan.model.image
    if not plan.keeps_newlines or not isinstance(image, TiledImageSpec):
        return 0
    return max(height // plan.model.clip.patch_size for height, _ in image.pinpoints)


def image_hash(data: bytes) -> str:
    """16 hex digits of the sha256."""
    return hashlib.sha256(data).hexdigest()[:16]


def check_images(dataset: Dataset, journal: Journal) -> None:
    """Compare the pictures that were asked about with those that are there now.

    Raises:
        UsageError: a picture has changed since.
    """
    known = {entry.question: entry.image for entry in journal.entries()}
    for _, pictures in _by_picture(dataset.questions):
        hashes = {known[question.id] for question in pictures if question.id in known}
        picture = pictures[0].picture
        if hashes and hashes != {image_hash(picture.read())}:
            raise UsageError(
                f"the image '{picture.name}' is not the one that '{journal.path}' holds answers about.",
                hint="Choose another --output, or begin anew with --overwrite.",
            )


def unanswered(plan: Plan, dataset: Dataset, journal: Journal) -> int:
    """Questions that are still to be asked, over all cells."""
    return sum(question.id not in journal.cell(*cell.asked) for cell in plan.to_ask() for question in dataset.questions)


def ask_all(
    bundle: Bundle,
    dataset: Dataset,
    plan: Plan,
    settings: AskSettings,
    journal: Journal,
    *,
    tell: Tell = lambda message: None,
    advance: Advance = lambda count: None,
) -> None:
    """Ask every question of every cell that the journal does not hold.

    Raises:
        ImageError: a picture does not decode. EnvironmentFaultError: this machine lacks something.
    """
    with shared_decoder(bundle, settings) as lent:
        for together in cells_by_engine(plan.to_ask()):
            cells = [cell for cell in together if _missing(cell, dataset.questions, journal)]
            if not cells:
                continue
            tell(f"{cells[0].method} at {', '.join(cell.words for cell in cells)} tokens")
            with opened_cell(bundle, cells[0], settings, lent) as opened:
                for picture, questions in _by_picture(dataset.questions):
                    _ask_about(opened, picture, questions, cells, settings, journal, advance)


def cells_by_engine(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that one loaded graph and decoder can answer: all budgets of a graph, one budget of an inner rule."""
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        inner = (cell.method, cell.budget) if cell.inner else ("", 0)
        found.setdefault((cell.graph, *inner), []).append(cell)
    return list(found.values())


def _missing(cell: Cell, questions: Sequence[Question], journal: Journal) -> list[Question]:
    answered = journal.cell(*cell.asked)
    return [question for question in questions if question.id not in answered]


def _by_picture(questions: Sequence[Question]) -> list[tuple[Picture, list[Question]]]:
    """The questions of each picture, also where the data does not keep them together."""
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.picture.name, []).append(question)
    return [(asked[0].picture, asked) for asked in found.values()]


def _ask_about(
    opened: Opened,
    picture: Picture,
    questions: Sequence[Question],
    cells: Sequence[Cell],
    settings: AskSettings,
    journal: Journal,
    advance: Advance,
) -> None:
    """One picture: one run of the graph for each cell that lacks answers about it."""
    missing = [(cell, _missing(cell, questions, journal)) for cell in cells]
    if not any(asked for _, asked in missing):
        return
    data = picture.read()
    try:
        pixels = pixels_from_pictures([data], opened.session.bundle.manifest.plan.model)
    except ImageError as error:
        raise ImageError(f"{questions[0].where}, '{picture.name}': {error.message}", hint=error.hint) from error
    for cell, asked in missing:
        if not asked:
            continue
        seen = opened.see(pixels, cell)
        for question in asked:
            answer = opened.session.answer(seen.rows, settings.prompt(question), sampling=settings.sampling)
            journal.add(
                JournalEntry(
                    method=cell.asked[0],
                    budget=cell.asked[1],
                    question=question.id,
                    image=image_hash(data),
                    text=answer.text,
                    visual_tokens=sum(answer.visual_tokens) if seen.entering is None else seen.entering,
                )
            )
            advance(1)
