"""From answers in a journal to the report, its tables, its files and its picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from evaluation_cases import HEADER, fill, questions_of, with_graphs
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.errors import StorageError, UsageError
from holov_export.evaluate.data import Dataset
from holov_export.evaluate.journal import open_journal
from holov_export.evaluate.plan import plan_from_bundle
from holov_export.evaluate.plot import plot_retention
from holov_export.evaluate.report import (
    JSON,
    MARKDOWN,
    evaluation_from_file,
    markdown_of,
    remarks_of,
    tables_of,
    write_evaluation,
)
from holov_export.evaluate.results import CellResult, Evaluation, KindValue, MetricValue, value_of
from holov_export.evaluate.run import AskSettings
from holov_export.evaluate.score import chosen_metrics, evaluation_from_journal

#: right answers of eight questions in four groups, and what the unpruned run and two rules at 16 tokens said
RIGHT = ["a", "b", "c", "d", "e", "f", "g", "h"]
UNPRUNED = ["a", "b", "c", "d", "e", "x", "g", "x"]  # 6 of 8
HOLOV = ["a", "b", "c", "y", "e", "x", "y", "y"]  # 4 of 8; 5 as the unpruned run
TOPK = ["a", "b", "c", "d", "e", "f", "g", "z"]  # 7 of 8; 6 as the unpruned run


@pytest.fixture(scope="module")
def bundle(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_graphs(toy_bundle, tmp_path_factory.mktemp("scores") / "two", ["cls-topk"])


@pytest.fixture
def dataset() -> Dataset:
    return questions_of([(f"group {index // 2}", [answer]) for index, answer in enumerate(RIGHT)])


def scored(bundle: Bundle, dataset: Dataset, folder: Path, budgets: tuple[int, ...] = (16,)) -> Evaluation:
    plan = plan_from_bundle(bundle, (), budgets)
    with open_journal(folder, HEADER) as journal:
        fill(journal, "holov", 64, UNPRUNED)
        fill(journal, "holov", 16, HOLOV)
        fill(journal, "cls-topk", 16, TOPK)
        return evaluation_from_journal(bundle, dataset, plan, AskSettings(), journal, command="c", seconds=1)


@pytest.fixture
def report(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> Evaluation:
    return scored(bundle, dataset, tmp_path / "journal")


def cell(report: Evaluation, method: str) -> CellResult:
    return next(item for item in report.cells if item.method == method)


def found(values: tuple[MetricValue, ...], metric: str) -> MetricValue:
    value = value_of(values, metric)
    assert value is not None
    return value


def test_values_retention_loyalty_and_differences(report: Evaluation) -> None:
    assert found(report.reference.metrics, "exact").value == pytest.approx(6 / 8)
    assert found(report.reference.metrics, "loyalty").value == 1
    holov, topk = cell(report, "holov"), cell(report, "cls-topk")
    assert found(holov.metrics, "exact").value == pytest.approx(4 / 8)
    assert found(holov.retention, "exact").value == pytest.approx(4 / 6, abs=1e-6)
    assert found(holov.metrics, "loyalty").value == pytest.approx(5 / 8)
    assert holov.differences == ()
    assert found(topk.retention, "exact").value == pytest.approx(7 / 6, abs=1e-6)
    assert found(topk.metrics, "loyalty").value == pytest.approx(6 / 8)
    assert found(topk.differences, "exact").value == pytest.approx(3 / 8)
    assert (holov.share, holov.visual_tokens) == (0.25, 16)


def test_intervals_hold_the_value_and_come_from_joint_draws(report: Evaluation) -> None:
    for item in report.cells:
        for value in (*item.metrics, *item.retention, *item.differences):
            assert value.value is not None and value.low is not None and value.high is not None
            assert value.low <= value.value <= value.high
    # the unpruned run compared with itself is 1 in every draw, which two separate draws would not be
    unpruned = found(report.reference.retention, "exact")
    assert (unpruned.low, unpruned.value, unpruned.high) == (1, 1, 1)


def test_the_bootstrap_draws_groups(bundle: Bundle, tmp_path: Path) -> None:
    """With every question of its own group the same answers give another interval."""
    grouped = questions_of([(f"group {index // 4}", [answer]) for index, answer in enumerate(RIGHT)])
    alone = questions_of([(f"group {index}", [answer]) for index, answer in enumerate(RIGHT)])
    wide, narrow = (
        found(cell(scored(bundle, data, tmp_path / name), "holov").metrics, "exact")
        for name, data in (("grouped", grouped), ("alone", alone))
    )
    assert wide.value == narrow.value
    # group 0 has 3 of 4 right, group 1 has 1 of 4: a draw has 1/4, 1/2 or 3/4
    assert (wide.low, wide.high) == (0.25, 0.75)
    assert (narrow.low, narrow.high) != (0.25, 0.75)


def test_equal_answers_give_equal_reports(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    first, second = scored(bundle, dataset, tmp_path / "a"), scored(bundle, dataset, tmp_path / "b")
    assert first.model_copy(update={"date": ""}) == second.model_copy(update={"date": ""})


def test_tables(report: Evaluation) -> None:
    tables = {title: (columns, rows) for title, columns, rows in tables_of(report)}
    columns, rows = tables["exact match, %"]
    assert columns == ("", "64 (100.0%)>", "16 (25.0%)>")
    assert [row[0] for row in rows] == ["unpruned", "holov", "cls-topk"]
    assert rows[0][1].startswith("75.0 [") and rows[0][2] == ""
    assert rows[1][1] == "" and rows[1][2].startswith("50.0 [")
    assert tables["kept of exact match, %"][1][2][2].startswith("116.7 [")
    assert list(tables).index("kept of exact match, %") == 1
    ((method, budget, difference),) = tables["exact match: difference to holov at the same budget, points"][1]
    assert (method, budget) == ("cls-topk", "16") and difference.startswith("+37.5 [")
    assert not any("kind" in title for title in tables)


def test_few_groups_are_said_to_be_few(report: Evaluation) -> None:
    said = "; ".join(remarks_of(report))
    assert "4 groups" in said and "too narrow" in said and "2000 bootstrap draws" in said


def test_one_group_has_values_without_intervals(bundle: Bundle, tmp_path: Path) -> None:
    dataset = questions_of([("one", [answer]) for answer in RIGHT])
    report = scored(bundle, dataset, tmp_path)
    value = found(cell(report, "holov").metrics, "exact")
    assert (value.value, value.low, value.high) == (0.5, None, None)
    assert any("no intervals" in remark for remark in report.remarks)
    rows = next(iter(tables_of(report)))[2]
    assert rows[1][2] == "50.0"
    plot_retention(report, tmp_path / "p.png")


def test_files_are_read_back(report: Evaluation, tmp_path: Path) -> None:
    paths = write_evaluation(report, tmp_path / "new" / "out")
    assert [path.name for path in paths] == [JSON, MARKDOWN]
    assert evaluation_from_file(paths[0]) == report
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted([JSON, MARKDOWN])
    text = paths[1].read_text(encoding="utf-8")
    assert "| unpruned |" in text and "## Kept of exact match, %" in text
    assert text == markdown_of(report)


def test_a_cell_with_a_bar_does_not_break_the_markdown(report: Evaluation) -> None:
    odd = report.cells[0].model_copy(update={"method": "a|b"})
    text = markdown_of(report.model_copy(update={"cells": (odd, *report.cells[1:])}))
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.split("## ")[1].splitlines() if line.startswith("|")}
    assert widths == {4}
    kinds = tuple(KindValue(kind=kind, metric="exact", questions=1, value=1.0) for kind in ("a|b", "c"))
    text = markdown_of(report.model_copy(update={"reference": report.reference.model_copy(update={"kinds": kinds})}))
    table = text.split("by kind of question")[1].split("\n\n")[1].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


def test_a_file_that_is_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / JSON).write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is no evaluation\.json"):
        evaluation_from_file(tmp_path / JSON)
    with pytest.raises(StorageError, match="cannot read"):
        evaluation_from_file(tmp_path / "none.json")


def test_another_schema_is_refused(report: Evaluation, tmp_path: Path) -> None:
    later = report.model_copy(update={"schema_version": report.schema_version + 1})
    write_evaluation(later, tmp_path)
    with pytest.raises(UsageError, match="its schema is 2"):
        evaluation_from_file(tmp_path / JSON)


def test_the_picture(report: Evaluation, tmp_path: Path) -> None:
    plot_retention(report, tmp_path / "retention.png")
    with Image.open(tmp_path / "retention.png") as picture:
        assert picture.size[0] > picture.size[1] > 500
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours  # both curves
    assert [path.name for path in tmp_path.glob("*.p*")] == ["retention.png"]
    with pytest.raises(StorageError, match="cannot write"):
        plot_retention(report, tmp_path / "none" / "retention.png")


def test_a_name_that_looks_like_a_formula_can_be_plotted(report: Evaluation, tmp_path: Path) -> None:
    data = report.data.model_copy(update={"name": "a$\\frac$b"})
    plot_retention(report.model_copy(update={"data": data}), tmp_path / "retention.png")
    assert (tmp_path / "retention.png").is_file()


def test_a_metric_that_is_asked_for_comes_first(dataset: Dataset) -> None:
    assert chosen_metrics(dataset, None)[0].name == "exact"
    assert chosen_metrics(dataset, "anls")[0].name == "anls"
    with pytest.raises(UsageError, match="'f1' does not apply to this data; these apply: exact, anls, loyalty"):
        chosen_metrics(dataset, "f1")
    with pytest.raises(UsageError, match="unknown metric 'bleu'"):
        chosen_metrics(dataset, "bleu")


def test_descriptions_have_no_retention(bundle: Bundle, tmp_path: Path) -> None:
    dataset = questions_of([(str(index), ["yes" if index % 2 else "no"]) for index in range(8)])
    plan = plan_from_bundle(bundle, ("holov",), (16,))
    with open_journal(tmp_path, HEADER) as journal:
        fill(journal, "holov", 64, ["no", "yes"] * 4)
        fill(journal, "holov", 16, ["no", "perhaps"] * 4)
        report = evaluation_from_journal(bundle, dataset, plan, AskSettings(), journal, metric="f1")
    (pruned,) = report.cells
    assert value_of(pruned.retention, "unclear") is None
    assert found(pruned.metrics, "unclear").value == 0.5
    assert found(pruned.metrics, "f1").value == 0 and found(pruned.retention, "f1").value == 0
    assert found(pruned.metrics, "precision").value is None  # it never said yes
    assert any("neither yes nor no count as wrong (holov at 16: 50.0%)" in said for said in remarks_of(report))
    assert report.metric == "f1"
