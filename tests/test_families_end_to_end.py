"""Each family the whole way: checkpoint, bundle, answer; token for token what transformers answers.

At the full budget: transformers' own generate on its own processor's inputs. At a third and a ninth: transformers'
language model fed its own embeddings and positions without the tokens that the bundle does not keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from family_checkpoints import write_family
from family_oracle import Asked, Clip, Oracle
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovPolicy
from holov_export.request import ExportRequest
from holov_export.runtime.session import Media, Session
from holov_export.spec import DecoderPrecision, Precision
from holov_export.tensors import Generation, ImageRows, SamplingSettings

NEW_TOKENS = 12
SETTINGS = SamplingSettings(max_new_tokens=NEW_TOKENS)
QUESTIONS = ("what is shown in this picture?", "how many digits are there? answer in one word.")
FAMILIES = (
    "llava_next",
    pytest.param("llava_next_mistral", marks=pytest.mark.slow),
    "qwen2_5_vl",
    "video_llava",
)


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint in both worlds."""

    name: str
    oracle: Oracle
    bundle: Bundle
    session: Session


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = write_family(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)
    bundle = bundle_of(folder, tmp_path_factory.mktemp("bundles") / request.param)
    with Session.open(bundle, provider="cpu", threads=1) as session:
        yield Family(request.param, Oracle(folder), bundle, session)


def bundle_of(folder: Path, output: Path, *, newlines: bool = True) -> Bundle:
    """The checkpoint exported for real, with its decoder, in float32; the export's own comparisons must pass."""
    request = ExportRequest(
        model=str(folder),
        policy=HolovPolicy(),
        precision=Precision.FP32,
        decoder=DecoderPrecision.FP32,
        output=output,
        newlines=newlines,
    )
    bundle, report = export_bundle(request)
    assert report is not None
    assert report.passed
    return bundle


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    """Photographs of unequal aspect ratios and sizes."""
    from skimage import data

    astronaut, coffee, chelsea, rocket = (
        Image.fromarray(np.asarray(picture))
        for picture in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    )
    return {
        "1:1": astronaut,
        "3:2": coffee,
        "1:3": chelsea.crop((100, 0, 200, 300)),
        "tiny": astronaut.crop((200, 60, 223, 77)),
        "huge": rocket.resize((2560, 1708)),
    }


def clip_of(picture: Image.Image, frames: int = 8) -> Clip:
    """Frames across a photograph, from left to right."""
    side = min(picture.size)
    steps = np.linspace(0, picture.width - side, frames).astype(int)
    return np.stack([np.asarray(picture.crop((int(x), 0, int(x) + side, side)).resize((96, 72))) for x in steps])


def full(family: Family) -> int:
    plan = family.bundle.manifest.plan
    return max(plan.of_part(part).tokens for part in plan.parts)


def gone_of(
    kept: Sequence[ImageRows], places: Sequence[npt.NDArray[np.int64]], *, newlines: bool
) -> npt.NDArray[np.int64]:
    """Which places of a prompt the bundle does not keep. Placeholders of newlines are behind each row of a region that
    has them; they go if none of the row's tokens stays.
    """
    gone: list[int] = []
    for rows, run in zip(kept, places, strict=True):
        if rows.layout is None:
            gone.extend(int(run[token]) for token in range(len(run)) if token not in set(rows.positions.tolist()))
            continue
        chosen, token, place = set(rows.positions.tolist()), 0, 0
        for region in rows.layout.regions:
            if region.cls:
                gone.extend([] if token in chosen else [int(run[place])])
                token, place = token + 1, place + 1
            for _ in range(region.grid[0]):
                line = range(token, token + region.grid[1])
                gone.extend(int(run[place + index]) for index, one in enumerate(line) if one not in chosen)
                token, place = token + region.grid[1], place + region.grid[1]
                if region.newlines:
                    if not newlines or chosen.isdisjoint(line):
                        gone.append(int(run[place]))
                    place += 1
        assert (token, place) == (rows.layout.tokens, len(run))
    return np.array(gone, dtype=np.int64)


def check_whole(family: Family, question: str, images: Sequence[Image.Image], clips: Sequence[Clip] = ()) -> Generation:
    """The full budget answers as transformers' generate does."""
    asked = family.oracle.asked(question, images, clips)
    ours = family.session.ask(list(images), question, videos=list(clips), budget=full(family), sampling=SETTINGS)
    assert ours.prompt_tokens == asked.inputs["input_ids"].shape[1]
    assert list(ours.token_ids) == family.oracle.answer(asked, NEW_TOKENS)
    return ours


def check_pruned(
    family: Family, question: str, images: Sequence[Image.Image], share: int, clips: Sequence[Clip] = (), **how: str
) -> None:
    """A `share`-th of each image's tokens answers as transformers does from the same tokens."""
    asked = family.oracle.asked(question, images, clips)
    quota = [max(1, tokens // share) for tokens in tokens_of(family, images, clips)]
    shown, moving = family.session.rows_of(list(images), list(clips), quota=quota, **how)  # type: ignore[arg-type]
    assert [len(rows.positions) for rows in (*shown, *moving)] == quota
    ours = family.session.answer(shown, question, videos=moving, sampling=SETTINGS)
    gone = gone_of([*shown, *moving], [*asked.images, *asked.videos], newlines=True)
    assert len(gone) > 0
    assert ours.prompt_tokens == asked.inputs["input_ids"].shape[1] - len(gone)
    assert list(ours.token_ids) == family.oracle.pruned_answer(asked, gone, NEW_TOKENS)


def tokens_of(family: Family, images: Sequence[Image.Image], clips: Sequence[Clip] = ()) -> list[int]:
    shown, moving = family.session.rows_of(list(images), list(clips), budget=full(family))
    return [len(rows.positions) for rows in (*shown, *moving)]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("shape", ["1:1", "3:2", "1:3", "tiny", "huge"])
def test_a_picture_at_the_full_budget(
    family: Family, pictures: dict[str, Image.Image], shape: str, question: str
) -> None:
    answer = check_whole(family, question, [pictures[shape]])
    assert len(answer.token_ids) > 0


@pytest.mark.parametrize("share", [3, 9])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("shape", ["1:1", "3:2", "1:3", "tiny", "huge"])
def test_a_picture_with_fewer_tokens(
    family: Family, pictures: dict[str, Image.Image], shape: str, question: str, share: int
) -> None:
    check_pruned(family, question, [pictures[shape]], share)


@pytest.mark.parametrize("share", [1, 3, 9])
def test_two_pictures_of_unequal_size(family: Family, pictures: dict[str, Image.Image], share: int) -> None:
    images = [pictures["1:3"], pictures["3:2"]]
    if share == 1:
        check_whole(family, QUESTIONS[0], images)
    else:
        check_pruned(family, QUESTIONS[0], images, share)


def test_a_batch_of_unequal_prompts_answers_as_each_alone(family: Family, pictures: dict[str, Image.Image]) -> None:
    groups = [[pictures["1:1"]], [pictures["tiny"], pictures["3:2"]], [pictures["huge"]]]
    questions = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]
    answers = family.session.ask_batch(groups, questions, budget=full(family), sampling=SETTINGS)
    for answer, group, question in zip(answers, groups, questions, strict=True):
        asked = family.oracle.asked(question, group)
        assert list(answer.token_ids) == family.oracle.answer(asked, NEW_TOKENS)
    quota = [7, 3, 5, 9]
    answers = family.session.ask_batch(groups, questions, quota=quota, sampling=SETTINGS)
    assert [answer.visual_tokens for answer in answers] == [
        family.session.ask(group, question, quota=few, sampling=SETTINGS).visual_tokens
        for group, question, few in zip(groups, questions, ([7], [3, 5], [9]), strict=True)
    ]
    single = family.session.ask(groups[1], questions[1], quota=[3, 5], sampling=SETTINGS)
    assert single.token_ids == answers[1].token_ids


@pytest.fixture
def video_family(family: Family) -> Family:
    if family.bundle.manifest.plan.model.video.kind == "none":
        pytest.skip(f"{family.name} takes no videos")
    return family


@pytest.mark.parametrize("share", [1, 3, 9])
@pytest.mark.parametrize("spread", ["frames", "clip"])
def test_a_clip(video_family: Family, pictures: dict[str, Image.Image], share: int, spread: str) -> None:
    clips = [clip_of(pictures["3:2"])]
    if share == 1:
        check_whole(video_family, QUESTIONS[0], [], clips)
    else:
        check_pruned(video_family, QUESTIONS[0], [], share, clips, spread=spread)


@pytest.mark.parametrize("share", [1, 3, 9])
def test_a_picture_and_two_clips_in_one_prompt(
    video_family: Family, pictures: dict[str, Image.Image], share: int
) -> None:
    clips = [clip_of(pictures["huge"]), clip_of(pictures["3:2"])]
    if share == 1:
        check_whole(video_family, QUESTIONS[1], [pictures["1:3"]], clips)
    else:
        check_pruned(video_family, QUESTIONS[1], [pictures["1:3"]], share, clips)


def test_frames_get_equal_quotas_and_a_clip_may_not(video_family: Family, pictures: dict[str, Image.Image]) -> None:
    clip = clip_of(pictures["3:2"])
    (rows,) = video_family.session.rows_of([], [clip], quota=[16])[1]
    assert rows.layout is not None
    ends = np.cumsum([region.tokens for region in rows.layout.regions])
    of_frame = np.bincount(np.searchsorted(ends, rows.positions, side="right"), minlength=len(ends))
    assert set(of_frame) == {16 // len(ends)}
    (whole,) = video_family.session.rows_of([], [clip], quota=[16], spread="clip")[1]
    assert len(whole.positions) == 16


def test_answers_of_a_batch_with_media(video_family: Family, pictures: dict[str, Image.Image]) -> None:
    clip = clip_of(pictures["3:2"])
    groups = [Media([pictures["1:1"]]), Media([], [clip]), Media([pictures["tiny"]], [clip])]
    questions = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]
    answers = video_family.session.ask_batch(groups, questions, budget=full(video_family), sampling=SETTINGS)
    for answer, group, question in zip(answers, groups, questions, strict=True):
        asked: Asked = video_family.oracle.asked(question, list(group.images), [clip] * len(group.videos))  # type: ignore[arg-type]
        assert list(answer.token_ids) == video_family.oracle.answer(asked, NEW_TOKENS)


def test_dropped_newlines_are_dropped(tmp_path: Path, pictures: dict[str, Image.Image]) -> None:
    """--no-newlines: only rows of tokens are left, at the full budget too."""
    folder = write_family(tmp_path / "checkpoint", "llava_next")
    bundle = bundle_of(folder, tmp_path / "bundle", newlines=False)
    oracle = Oracle(folder)
    asked = oracle.asked(QUESTIONS[0], [pictures["3:2"]])
    with Session.open(bundle, provider="cpu", threads=1) as session:
        for quota in (bundle.manifest.plan.tokens, 20):
            shown, _ = session.rows_of([pictures["3:2"]], budget=quota)
            gone = gone_of(shown, asked.images, newlines=False)
            answer = session.answer(shown, QUESTIONS[0], sampling=SETTINGS)
            assert answer.visual_tokens == (len(shown[0].positions),)
            assert list(answer.token_ids) == oracle.pruned_answer(asked, gone, NEW_TOKENS)
