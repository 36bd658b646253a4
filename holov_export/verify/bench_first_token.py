"""The time to a decoder's first token, stage by stage."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from PIL import Image

from holov_export.runtime.decoder import Decoder
from holov_export.runtime.session import Session
from holov_export.tensors import SamplingSettings, Timings
from holov_export.verify.bench import interleaved
from holov_export.verify.bench_engines import Contestant
from holov_export.verify.bench_pictures import usual_pictures
from holov_export.verify.bench_results import FirstTokenResult
from holov_export.verify.pictures import clip_of

QUESTION = "what is shown?"


def first_tokens(
    one: Contestant, decoder: Decoder, budgets: Sequence[int], rounds: int, pictures: Sequence[Image.Image] = ()
) -> Iterator[FirstTokenResult]:
    """Ask one question about one picture or clip at every budget, in interleaved rounds after one round of warm-up."""
    session = Session(one.bundle, one.runner, lambda: decoder)  # not closed: both are the caller's
    plan = one.bundle.manifest.plan
    picture = (list(pictures) or usual_pictures(plan))[0]
    images, videos = ([picture], []) if plan.part == "image" else ([], [clip_of(picture)])
    sampling = SamplingSettings(max_new_tokens=1)

    def ask(budget: int) -> tuple[Timings, int]:
        answer = session.ask(images, QUESTION, videos=videos, budget=budget, sampling=sampling)
        return answer.timings, answer.prompt_tokens

    taken: dict[int, list[tuple[Timings, int]]] = {budget: [] for budget in budgets}
    for budget in budgets:
        ask(budget)
    for budget in interleaved(budgets, rounds):
        taken[budget].append(ask(budget))
    for budget, answers in taken.items():
        times = [timings for timings, _ in answers]
        yield FirstTokenResult(
            contestant=one.info.label,
            budget=budget,
            prompt_tokens=answers[0][1],
            preprocess=_median_ms([item.preprocess for item in times]),
            vision=_median_ms([item.vision for item in times]),
            stitch=_median_ms([item.stitch for item in times]),
            setup=_median_ms([item.setup for item in times]),
            prefill=_median_ms([item.prefill for item in times]),
            total=_median_ms([item.ttft for item in times]),
            samples=len(times),
        )


def _median_ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 4)
