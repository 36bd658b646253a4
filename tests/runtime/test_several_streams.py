"""Several prompts seen together and answered in turn give what each gives alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, EnvironmentFaultError
from holov_export.runtime.media import Media, boxes_of_tokens
from holov_export.runtime.session import Session
from holov_export.tensors import CropBox, Generation, Region, SamplingSettings

SHORT = SamplingSettings(max_new_tokens=12)
QUESTIONS = ("what is this?", "count the digits", "and here?")
QUOTAS = (5, 64, 1)


@pytest.fixture(scope="module", params=["genai", "ort"])
def session(request: pytest.FixtureRequest, answering_bundle: Bundle) -> Iterator[Session]:
    with Session.open(answering_bundle, decoder=request.param, provider="cpu", threads=1) as opened:
        yield opened


def alone(session: Session, photographs: list[Image.Image]) -> list[Generation]:
    return [
        session.ask(photograph, question, budget=quota, sampling=SHORT)
        for photograph, question, quota in zip(photographs, QUESTIONS, QUOTAS, strict=False)
    ]


def test_answers_made_in_turn_are_those_made_alone(session: Session, photographs: list[Image.Image]) -> None:
    assert session.decoder.lanes >= 3
    seen, _ = session.see_groups([Media([photograph]) for photograph in photographs[:3]], QUOTAS)
    streams = [
        session.answer_stream(one.images, text, sampling=SHORT) for one, text in zip(seen, QUESTIONS, strict=True)
    ]
    pieces: list[list[str]] = [[], [], []]
    while not all(stream.ended for stream in streams):
        for stream, own in zip(streams, pieces, strict=True):
            own.extend([piece] if (piece := next(stream, None)) is not None else [])
    expected = alone(session, photographs)
    found = [stream.generation() for stream in streams]
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert ["".join(own) for own in pieces] == [one.text for one in expected]
    assert [one.visual_tokens for one in found] == [(5,), (64,), (1,)]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]


def test_one_that_is_closed_early_leaves_the_others_alone(session: Session, photographs: list[Image.Image]) -> None:
    seen, _ = session.see_groups([Media([photograph]) for photograph in photographs[:2]], QUOTAS[:2])
    first, second = (session.answer_stream(one.images, QUESTIONS[0], sampling=SHORT) for one in seen)
    next(first), next(second), next(first)
    first.close()
    first.close()
    assert first.ended and len(first.generation().token_ids) == 2
    assert list(first) == []
    for _ in second:
        pass
    assert (
        second.generation().token_ids
        == session.ask(photographs[1], QUESTIONS[0], budget=QUOTAS[1], sampling=SHORT).token_ids
    )


def test_prompts_without_pictures_are_seen_as_nothing(session: Session, photographs: list[Image.Image]) -> None:
    seen, stages = session.see_groups([Media([]), Media(photographs[:2]), Media([])], [3, 4])
    assert [len(one.images) for one in seen] == [0, 2, 0]
    assert [len(rows.rows) for rows in seen[1].images] == [3, 4]
    assert stages.vision > 0
    assert session.see_groups([Media([])], [])[0][0].images == ()
    answer = session.answer_stream((), "what is this?", sampling=SHORT)
    assert answer.prompt.counts == ()


def test_each_prompt_has_its_own_rows(session: Session, photographs: list[Image.Image]) -> None:
    seen, _ = session.see_groups([Media(photographs[:1]), Media(photographs[1:3])], [4, 5, 6])
    for one, photograph, quota in zip([*seen[0].images, *seen[1].images], photographs[:3], [4, 5, 6], strict=True):
        rows, _ = session.rows_of(photograph, budget=quota)
        np.testing.assert_allclose(one.rows, rows[0].rows, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(one.positions, rows[0].positions)
    with pytest.raises(BudgetError, match="2 quotas for 3 images"):
        session.see_groups([Media(photographs[:3])], [4, 5])


def test_a_closed_session_sees_nothing(answering_bundle: Bundle, photographs: list[Image.Image]) -> None:
    session = Session.open(answering_bundle, decoder="none", provider="cpu", threads=1)
    session.close()
    with pytest.raises(EnvironmentFaultError, match="closed"):
        session.see_groups([Media(photographs[:1])], [4])


def test_regions_say_where_tokens_are(session: Session, photographs: list[Image.Image]) -> None:
    (seen,), _ = session.see_groups([Media(photographs[:1])], [64])
    (regions,) = seen.regions
    boxes = boxes_of_tokens(seen.images[0].positions, regions)
    width, height = photographs[0].size
    assert len(boxes) == 64
    assert boxes[0] is not None and boxes[-1] is not None
    assert (boxes[0].left, boxes[0].top) == pytest.approx((regions[0].box.left, regions[0].box.top))
    assert (boxes[-1].right, boxes[-1].bottom) == pytest.approx((regions[0].box.right, regions[0].box.bottom))
    assert boxes[-1].right <= width and boxes[-1].bottom <= height


def test_boxes_of_regions_one_after_another() -> None:
    regions = (
        Region((1, 2), CropBox(0, 0, 20, 10)),
        Region((2, 1), CropBox(0, 0, 20, 40), cls=True),
    )
    positions = np.array([1, 2, 3, 4, -1, 9], dtype=np.int64)
    assert boxes_of_tokens(positions, regions) == [
        CropBox(10, 0, 20, 10),
        None,
        CropBox(0, 0, 20, 20),
        CropBox(0, 20, 20, 40),
        None,
        None,
    ]
