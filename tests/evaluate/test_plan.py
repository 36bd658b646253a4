from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_cases import with_graphs

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, UnknownNameError, UsageError
from holov_export.evaluate.inner import INNER_METHODS
from holov_export.evaluate.plan import Cell, plan_from_bundle
from holov_export.policies import policy_from_settings
from holov_export.spec import Cut


@pytest.fixture(scope="module")
def bundle(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_graphs(toy_bundle, tmp_path_factory.mktemp("plans") / "three", ["cls-topk", "holov-official"])


def of_policy(bundle: Bundle, method: str, *cuts: Cut) -> Bundle:
    """The bundle of one graph as if its rule were another."""
    plan = bundle.manifest.plan.model_copy(update={"policy": policy_from_settings(method), "cuts": cuts, "also": ()})
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"plan": plan}))


def test_every_rule_at_every_budget_from_the_largest(bundle: Bundle) -> None:
    plan = plan_from_bundle(bundle, (), (7, 16, 7))
    assert plan.methods == ("holov", "cls-topk", "holov-official")
    assert plan.budgets == (16, 7)
    assert [(cell.method, cell.budget) for cell in plan.cells] == [
        (method, budget) for method in plan.methods for budget in (16, 7)
    ]
    assert plan.reference == Cell("holov", 64, ("holov", 64), "holov", 64)
    assert plan.baseline == "holov"
    assert [cell.asked for cell in plan.to_ask()] == [("holov", 64), *[cell.asked for cell in plan.cells]]


def test_the_usual_budgets_are_shares_of_all_tokens(bundle: Bundle) -> None:
    assert plan_from_bundle(bundle, ("holov",), ()).budgets == (21, 14, 7)


def test_rules_that_lose_nothing_at_the_full_budget_share_the_unpruned_run(bundle: Bundle) -> None:
    plan = plan_from_bundle(bundle, ("cls-topk", "holov-official", "holov"), (64, 16))
    asked = {cell.method: cell.asked for cell in plan.cells if cell.budget == 64}
    assert asked["cls-topk"] == asked["holov"] == plan.reference.asked == ("holov", 64)
    assert asked["holov-official"] == ("holov-official", 64)  # it loses tokens there
    assert len(plan.to_ask()) == 5
    graphs = {cell.asked: cell.graph for cell in plan.to_ask()}
    assert all(graph == method for (method, _), graph in graphs.items())


def test_the_reference_is_a_rule_that_loses_nothing_whatever_was_asked_for(bundle: Bundle) -> None:
    plan = plan_from_bundle(bundle, ("holov-official",), (16,))
    assert plan.reference.graph == "holov"
    assert (plan.methods, plan.baseline) == (("holov-official",), "holov-official")


def test_the_unpruned_run_is_the_same_whatever_is_compared(bundle: Bundle) -> None:
    """So that its answers are found again when other methods are asked for."""
    compared = [("holov",), ("cls-topk",), ("cls-topk", "holov"), ("holov-official",)]
    assert {plan_from_bundle(bundle, methods, (16,)).reference.asked for methods in compared} == {("holov", 64)}


def test_no_rule_that_keeps_everything(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no unpruned run"):
        plan_from_bundle(of_policy(bundle, "holov-official"), (), (16,))


def test_a_graph_with_a_cut_is_a_reference_only_where_there_is_no_other(bundle: Bundle) -> None:
    cut = of_policy(bundle, "holov", Cut(layer=1))
    plan = plan_from_bundle(cut, (), (16,))
    assert plan.reference.graph == "holov@1"
    assert "holov@1" in plan.remarks[0]


def test_an_unknown_method_names_those_that_there_are(bundle: Bundle) -> None:
    with pytest.raises(UnknownNameError, match="no method 'scope'; it has: holov, cls-topk, holov-official"):
        plan_from_bundle(bundle, ("holov", "scope"), (16,))


@pytest.mark.parametrize("method", INNER_METHODS)
def test_rules_inside_the_language_model_need_the_hf_decoder(bundle: Bundle, method: str) -> None:
    with pytest.raises(UsageError, match="prunes inside the language model"):
        plan_from_bundle(bundle, (method,), (48,))
    plan = plan_from_bundle(bundle, (method, "holov"), (64, 48), decoder="hf")
    full, pruned = (cell for cell in plan.cells if cell.method == method)
    assert full.asked == plan.reference.asked == ("holov", 64)
    assert (pruned.asked, pruned.graph, pruned.graph_budget, pruned.inner) == ((method, 48), "holov", 64, True)
    assert pruned.layer_average is not None and 1 <= pruned.layer_average <= 64
    assert plan.baseline == "holov"


def test_a_budget_that_a_rule_cannot_reach_is_left_out_and_said(bundle: Bundle) -> None:
    """Three layers: those before PyramidDrop's first cut see all tokens."""
    plan = plan_from_bundle(bundle, ("pyramiddrop", "holov"), (48, 2), decoder="hf")
    assert [(cell.method, cell.budget) for cell in plan.cells] == [("pyramiddrop", 48), ("holov", 48), ("holov", 2)]
    assert "pyramiddrop at 2 is left out" in plan.remarks[0]
    with pytest.raises(BudgetError, match="cannot average 2 tokens"):
        plan_from_bundle(bundle, ("pyramiddrop",), (2,), decoder="hf")


def test_budgets_and_baselines_that_cannot_be(bundle: Bundle) -> None:
    with pytest.raises(BudgetError, match=r"1\.\.64"):
        plan_from_bundle(bundle, (), (65,))
    with pytest.raises(UsageError, match="the baseline 'cls-topk' is not among the methods: holov"):
        plan_from_bundle(bundle, ("holov",), (16,), baseline="cls-topk")
    assert plan_from_bundle(bundle, (), (16,), baseline="cls-topk").baseline == "cls-topk"


def test_the_views_of_the_bundle_are_what_is_planned_with(bundle: Bundle) -> None:
    for method in bundle.methods:
        view = bundle.of_method(method)
        assert view.manifest.plan.policy.method == method
        assert view.vision.is_file() and Path(view.vision).parent == bundle.folder
