"""What people read of a precision report."""

from __future__ import annotations

import pytest
from changed_bundles import INT8, WRITTEN

from holov_export.cli.precision_text import precision_line, print_precision
from holov_export.quantize.precision_report import (
    AnswersAt,
    AnswersKept,
    Estimated,
    PrecisionReport,
    vision_verdicts,
)
from holov_export.recipes import Limits
from holov_export.verify.vision_loss import PictureLoss, summary_of


def loss(picture: str, budget: int, overlap: float, cosine: float | None = 0.9995, tokens: int = 144) -> PictureLoss:
    return PictureLoss(
        picture=picture,
        tokens=tokens,
        budget=budget,
        count=budget,
        overlap=overlap,
        cosine_min=cosine,
        cosine_mean=cosine,
        saliency_error=0.01,
        sound=cosine is not None,
    )


def report(*losses: PictureLoss, accepted: bool = False) -> PrecisionReport:
    return PrecisionReport(
        precision="int8",
        method="holov",
        part="image",
        compared_with="fp32",
        recipe="smoke-8",
        recipe_sha256="",
        quantization=INT8,
        pictures=("a.png", "b.png"),
        losses=losses,
        summary=summary_of(losses),
        limits=Limits(),
        verdicts=vision_verdicts(losses, Limits()),
        written=WRITTEN,
        accepted_loss=accepted,
    )


GOOD = report(loss("a.png", 16, 1.0), loss("b.png", 16, 15 / 16), loss("a.png", 144, 1.0), loss("b.png", 144, 1.0))
BAD = report(loss("a.png", 16, 12 / 16), loss("b.png", 16, 1.0))
ANSWERS = AnswersKept(
    data="scenes",
    sha256="",
    questions=1764,
    pictures=200,
    metric="exact match",
    decoders=("fp32", "int4"),
    confidence=0.95,
    resamples=2000,
    at=(
        AnswersAt(
            budget=16,
            own_share=None,
            same=1755,
            loyalty=Estimated(value=1755 / 1764, low=0.991, high=0.998),
            before=Estimated(value=0.9422),
            after=Estimated(value=0.9405),
            kept=None,
        ),
    ),
    examples=(),
)


def lines(capsys: pytest.CaptureFixture[str], shown: PrecisionReport) -> tuple[list[str], str]:
    """Of stdout, with one blank where there are several; and stderr."""
    print_precision(shown)
    said = capsys.readouterr()
    return [" ".join(line.split()) for line in said.out.splitlines()], said.err


def test_a_good_report(capsys: pytest.CaptureFixture[str]) -> None:
    rows, err = lines(capsys, GOOD)
    assert rows[0] == "int8 against fp32, holov, 2 pictures of recipe smoke-8"
    assert "16 0.938 0.969 1/2 0.999500 0.999500 1.0e-02 b.png" in rows
    assert "144 - - 0.999500 0.999500 1.0e-02 a.png" in rows
    assert "overlap 0.97 0.938 b.png at 16 tokens, one token ok" in rows
    assert "cosine 0.999 0.99950 a.png at 16 tokens ok" in rows
    assert "2 of 4 products quantised; fp32 stay c, d; weights 2.0 MB -> 500.0 kB" in rows
    assert "answers were not compared: nobody was asked" in err
    assert precision_line(GOOD) == "int8 against fp32: overlap 0.938, cosine 0.99950  ok"


def test_a_bad_report_says_so_also_where_it_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = lines(capsys, BAD.with_keep(("layers.3", "layers.4.mlp")))
    assert "overlap 0.97 0.750 a.png at 16 tokens FAILED" in rows
    assert "a sweep says to keep: layers.3, layers.4.mlp" in rows
    assert precision_line(BAD).endswith("  FAILED")
    accepted = report(*BAD.losses, accepted=True)
    rows, _ = lines(capsys, accepted)
    assert "overlap 0.97 0.750 a.png at 16 tokens FAILED, accepted" in rows
    assert precision_line(accepted).endswith("  FAILED, accepted")


def test_answers_stand_beside_the_number_of_questions(capsys: pytest.CaptureFixture[str]) -> None:
    rows, err = lines(capsys, GOOD.with_answers(ANSWERS))
    assert "16 1755 of 1764 99.5 [99.1, 99.8] 94.2 94.0 -" in rows
    note = "1,764 questions about 200 pictures; 95% bootstrap intervals; decoders fp32 and int4"
    assert note in rows
    assert "answers 0.98 0.995 9 of 1764 differ at 16 tokens ok" in rows
    assert err == ""
    assert "answers 0.995 (1,764 questions)" in precision_line(GOOD.with_answers(ANSWERS))


def test_what_is_not_sound_has_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = lines(capsys, report(loss("a.png", 16, 1.0, None)))
    assert "16 1.000 1.000 1/1 - - - not sound" in rows


def test_pictures_of_unequal_sizes_are_grouped_by_share(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = report(
        loss("a.png", 40, 1.0, tokens=360), loss("b.png", 15, 1.0, tokens=132), loss("a.png", 360, 1.0, tokens=360)
    )
    rows, _ = lines(capsys, mixed)
    assert [row.split(" 1.000")[0] for row in rows[2:4]] == ["1/9 of each", "all - - 0.999500 0.999500 1.0e-02 a.png"]
