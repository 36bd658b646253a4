from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_cases import HEADER, fill, questions_of, with_graphs, write_questions

from holov_export.bundle import Bundle
from holov_export.evaluate.data import dataset_from_jsonl
from holov_export.evaluate.journal import open_journal
from holov_export.evaluate.plan import Plan, plan_from_bundle
from holov_export.evaluate.recommend import (
    Latency,
    Measured,
    Recommendation,
    latencies_of,
    recommendation_from,
    table_of,
    verdict_of,
)
from holov_export.evaluate.run import AskSettings
from holov_export.evaluate.score import evaluation_from_journal

QUESTIONS = 200


@pytest.fixture(scope="module")
def bundle(answering_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_graphs(answering_bundle, tmp_path_factory.mktemp("recommended") / "two", ["cls-topk"])


def right(share: float) -> list[str]:
    """Answers of which so many are right, spread evenly."""
    percent = round(share * 100)
    return ["x" if index * percent % 100 < percent else "wrong" for index in range(QUESTIONS)]


def times(first_token: float) -> Latency:
    return Latency(vision=first_token / 2, setup=0, prefill=first_token / 2, first_token=first_token)


def recommended(bundle: Bundle, folder: Path, retain: float, shares: dict[tuple[str, int], float]) -> Recommendation:
    """From shares of right answers; cls-topk is the faster rule."""
    dataset = questions_of([(str(index), ["x"]) for index in range(QUESTIONS)])
    plan: Plan = plan_from_bundle(bundle, (), tuple({budget for _, budget in shares}))
    with open_journal(folder, HEADER) as journal:
        fill(journal, "holov", 64, right(1.0))
        for (method, budget), share in shares.items():
            if budget < 64:
                fill(journal, method, budget, right(share))
        report = evaluation_from_journal(bundle, dataset, plan, AskSettings(), journal)
    speeds = {cell.asked: times(cell.budget + (1.0 if cell.method == "holov" else 0.0)) for cell in plan.to_ask()}
    return recommendation_from(report, plan, Measured(speeds, 3), retain)


BOTH = {("holov", 32): 1.0, ("holov", 16): 0.98, ("holov", 4): 0.5, ("cls-topk", 32): 1.0, ("cls-topk", 4): 0.5}


@pytest.mark.parametrize(
    ("retain", "topk_at_16", "expected"),
    [
        (0.94, 0.98, ("cls-topk", 16)),  # both keep it at 16: the faster one
        (0.94, 0.90, ("holov", 16)),  # only the slower one keeps it at 16
        (0.98, 0.98, ("cls-topk", 32)),  # at 16 the value is 0.98, but not the lower end
        (0.4, 0.98, ("cls-topk", 4)),
    ],
)
def test_the_smallest_budget_and_then_the_fastest_rule(
    bundle: Bundle, tmp_path: Path, retain: float, topk_at_16: float, expected: tuple[str, int]
) -> None:
    found = recommended(bundle, tmp_path, retain, {**BOTH, ("cls-topk", 16): topk_at_16})
    assert found.chosen is not None
    assert (found.chosen.method, found.chosen.budget) == expected
    assert found.chosen.retention.low is not None and found.chosen.retention.low >= retain
    assert f"{expected[0]} at {expected[1]} of 64 tokens keeps at least" in verdict_of(found)


def test_candidates_are_in_order_and_the_chosen_one_is_marked(bundle: Bundle, tmp_path: Path) -> None:
    found = recommended(bundle, tmp_path, 0.94, {**BOTH, ("cls-topk", 16): 0.98})
    order = [(item.method, item.budget) for item in found.candidates]
    assert order == [(method, budget) for budget in (4, 16, 32) for method in ("cls-topk", "holov")]
    _, columns, rows = table_of(found)
    assert len(columns) == len(rows[0])
    assert [row[0] for row in rows if row[-1] == "<- smallest"] == ["cls-topk"]
    assert [row[-1] for row in rows] == ["", "", "<- smallest", "keeps", "keeps", "keeps", ""]
    assert rows[-1][:2] == ["unpruned", "64"]


def test_nothing_that_keeps_enough_is_said(bundle: Bundle, tmp_path: Path) -> None:
    found = recommended(bundle, tmp_path, 0.9, {("holov", 4): 0.5, ("cls-topk", 4): 0.6})
    assert found.chosen is None
    assert "nothing keeps 90.0% of exact match: the most that is certain is 5" in verdict_of(found)
    assert "with cls-topk at 4 tokens" in verdict_of(found)


def test_an_interval_without_width_is_doubted(bundle: Bundle, tmp_path: Path) -> None:
    found = recommended(bundle, tmp_path / "a", 0.98, {("holov", 4): 1.0, ("cls-topk", 4): 0.5})
    assert found.chosen is not None and found.chosen.retention.low == 1
    assert "up to 2% of all groups" in found.remarks[-1]  # 3 / 200, rounded
    assert not recommended(bundle, tmp_path / "b", 0.9, {("holov", 4): 0.98, ("cls-topk", 4): 0.5}).remarks


def test_the_unpruned_run_is_no_recommendation(bundle: Bundle, tmp_path: Path) -> None:
    found = recommended(bundle, tmp_path, 0.9, {("holov", 64): 1.0, ("holov", 4): 0.5, ("cls-topk", 4): 0.5})
    assert found.chosen is None
    assert {item.budget for item in found.candidates} == {4}
    found = recommended(bundle, tmp_path / "full", 0.9, {("holov", 64): 1.0, ("cls-topk", 64): 1.0})
    assert not found.candidates and "nothing is pruned" in verdict_of(found)


def test_every_cell_is_timed_and_the_rounds_are_told(bundle: Bundle, tmp_path: Path) -> None:
    dataset = dataset_from_jsonl(write_questions(tmp_path, pictures=1, each=1))
    plan = plan_from_bundle(bundle, (), (64, 16))
    settings = AskSettings(provider="cpu", threads=1, max_new_tokens=4)
    found = latencies_of(bundle, plan, settings, dataset.questions[0], rounds=3, seconds=60)
    assert set(found.latencies) == {("holov", 64), ("holov", 16), ("cls-topk", 16)}
    assert found.rounds == 3
    for latency in found.latencies.values():
        assert latency.vision > 0 and latency.prefill > 0 and latency.setup > 0
        assert latency.first_token >= max(latency.vision, latency.prefill)
    once = latencies_of(bundle, plan, settings, dataset.questions[0], rounds=50, seconds=1e-9)
    assert once.rounds == 1
