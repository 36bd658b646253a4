"""How many tokens each layer sees, against the published lists; and what `holov-export methods` says of the methods."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holov_export.cli import run
from holov_export.errors import BudgetError, UsageError
from holov_export.policies import POLICIES
from holov_export.runtime.decoder_hf_inner import INNER_METHODS
from holov_export.runtime.inner.methods import (
    INNER,
    FastVSettings,
    PyramidDropSettings,
    SparseVlmSettings,
)
from holov_export.runtime.inner.schedule import (
    SMALLEST_RATIO,
    Cut,
    Schedule,
    fastv_schedule,
    pyramiddrop_schedule,
    recycled,
    scaled_layers,
    sparsevlm_kept,
    sparsevlm_schedule,
)

FASTV, SPARSE, PYRAMID = FastVSettings(), SparseVlmSettings(), PyramidDropSettings()
N, DEPTH = 576, 32


class TestFastV:
    def test_the_published_half(self) -> None:
        """K = 2, R = 50 %: 288 of 576 from layer 2 on, an average of 306."""
        schedule = fastv_schedule(N, DEPTH, 288, FASTV)
        assert schedule.per_layer == (576, 576) + (288,) * 30
        assert schedule.average == 306

    def test_another_layer(self) -> None:
        assert fastv_schedule(20, 5, 7, FastVSettings(layer=3)).per_layer == (20, 20, 20, 7, 7)

    def test_a_layer_past_the_last(self) -> None:
        with pytest.raises(UsageError, match="layer is 2, the decoder has 2"):
            fastv_schedule(20, 2, 7, FASTV)


class TestSparseVlm:
    @pytest.mark.parametrize(
        ("budget", "kept", "merged", "average"),
        [
            (192, (300, 200, 110), (9, 4, 3), 192.03),
            (128, (303, 110, 36), (9, 7, 3), 128.62),
            (96, (238, 48, 26), (11, 7, 1), 96.94),
            (64, (66, 30, 17), (16, 2, 1), 64.81),
        ],
    )
    def test_published_lists_at_576_tokens_and_32_layers(
        self, budget: int, kept: tuple[int, ...], merged: tuple[int, ...], average: float
    ) -> None:
        """Layers 2, 6 and 15 prune what they put out. Counted behind each layer, the averages are near the budgets."""
        schedule = sparsevlm_schedule(N, DEPTH, budget, SPARSE)
        assert tuple(cut.layer for cut in schedule.cuts) == (3, 7, 16)
        assert tuple(cut.keep for cut in schedule.cuts) == kept
        assert tuple(cut.merged for cut in schedule.cuts) == merged
        seen = schedule.per_layer
        assert seen[:3] == (576,) * 3
        assert seen[3:7] == (kept[0] + merged[0],) * 4
        assert seen[16:] == (kept[2] + merged[2],) * 16
        behind = [*seen[1:], seen[-1]]
        assert sum(behind) / DEPTH == pytest.approx(average, abs=0.01)
        assert abs(average - budget) < 1

    def test_other_numbers_of_tokens_in_proportion(self) -> None:
        assert sparsevlm_kept(144, 16) == (17, 8, 4)  # a quarter of 66, 30, 17, rounded half up
        assert sparsevlm_kept(2880, 960) == (1500, 1000, 550)

    def test_budgets_between_and_beyond_the_lists(self) -> None:
        assert sparsevlm_kept(N, 160) == (302, 155, 73)  # half way between 128 and 192
        assert sparsevlm_kept(N, 32) == (33, 15, 9)  # half of 64
        assert sparsevlm_kept(N, 384) == (438, 388, 343)  # half way between 192 and all
        assert sparsevlm_kept(N, 1) == (1, 1, 1)

    def test_without_recycling(self) -> None:
        schedule = sparsevlm_schedule(N, DEPTH, 64, SparseVlmSettings(recycle=False))
        assert [cut.left for cut in schedule.cuts] == [66, 30, 17]

    def test_how_many_are_recycled(self) -> None:
        """30 % and one more become a tenth of them and one more."""
        assert recycled(276, SPARSE) == (83, 9)
        assert recycled(1, SPARSE) == (1, 1)
        assert recycled(0, SPARSE) == (0, 0)


class TestPyramidDrop:
    def test_the_published_ratios_are_an_average_of_270(self) -> None:
        schedule = pyramiddrop_schedule(N, DEPTH, 270, PYRAMID)
        assert schedule.cuts == (Cut(8, 288), Cut(16, 144), Cut(24, 72))
        assert schedule.average == 270

    def test_published_layers_as_long_as_the_ratio_allows(self) -> None:
        schedule = pyramiddrop_schedule(N, DEPTH, 192, PYRAMID)
        assert [cut.layer for cut in schedule.cuts] == [8, 16, 24]
        assert 191 < schedule.average <= 192

    @pytest.mark.parametrize(("budget", "layers"), [(128, [5, 10, 15]), (64, [2, 4, 6])])
    def test_smaller_budgets_move_the_stages_towards_the_input(self, budget: int, layers: list[int]) -> None:
        schedule = pyramiddrop_schedule(N, DEPTH, budget, PYRAMID)
        assert [cut.layer for cut in schedule.cuts] == layers
        assert budget - 1 < schedule.average <= budget
        assert schedule.cuts[0].keep / N >= SMALLEST_RATIO - 1 / N

    def test_an_average_out_of_reach_names_the_least_that_is_not(self) -> None:
        with pytest.raises(BudgetError, match="at least 30, or set budget_is='last'") as caught:
            pyramiddrop_schedule(144, 5, 16, PYRAMID)
        assert caught.value.exit_code == 2
        assert pyramiddrop_schedule(144, 5, 30, PYRAMID).average <= 30
        with pytest.raises(BudgetError):
            pyramiddrop_schedule(144, 5, 29, PYRAMID)

    def test_the_budget_may_be_the_last_stage(self) -> None:
        last = PyramidDropSettings(budget_is="last")
        assert pyramiddrop_schedule(N, DEPTH, 72, last).cuts == (Cut(8, 288), Cut(16, 144), Cut(24, 72))
        assert pyramiddrop_schedule(144, 5, 16, last).per_layer == (144, 69, 69, 33, 16)


@pytest.mark.parametrize(
    ("published", "depth", "found"),
    [
        ((3, 7, 16), 32, (3, 7, 16)),
        ((3, 7, 16), 40, (4, 9, 20)),
        ((3, 7, 16), 5, (1, 2, 3)),
        ((3, 7, 16), 2, (1,)),
        ((8, 16, 24), 40, (10, 20, 30)),
        ((8, 16, 24), 5, (1, 3, 4)),
        ((8, 16, 24), 3, (1, 2)),
    ],
)
def test_layers_scale_with_the_depth(published: tuple[int, ...], depth: int, found: tuple[int, ...]) -> None:
    assert scaled_layers(published, depth) == found


def test_one_layer_has_no_place_for_a_cut() -> None:
    with pytest.raises(UsageError, match="one layer"):
        scaled_layers((3, 7, 16), 1)


def schedules(tokens: int, depth: int, budget: int) -> list[Schedule]:
    made = [
        sparsevlm_schedule(tokens, depth, budget, SPARSE),
        pyramiddrop_schedule(tokens, depth, budget, PyramidDropSettings(budget_is="last")),
    ]
    if depth > FASTV.layer:
        made.append(fastv_schedule(tokens, depth, budget, FASTV))
    return made


@given(st.data(), st.integers(1, 800), st.integers(2, 48))
def test_every_schedule_falls_from_n_and_leaves_something(data: st.DataObject, tokens: int, depth: int) -> None:
    budget = data.draw(st.integers(1, tokens))
    for schedule in schedules(tokens, depth, budget):
        seen = schedule.per_layer
        assert len(seen) == depth
        assert seen[0] == tokens
        assert list(seen) == sorted(seen, reverse=True)
        assert seen[-1] >= 1
        assert [cut.layer for cut in schedule.cuts] == sorted({cut.layer for cut in schedule.cuts})
        assert 1 <= schedule.cuts[0].layer <= schedule.cuts[-1].layer < depth
    for schedule in schedules(tokens, depth, tokens):
        assert schedule.per_layer == (tokens,) * depth


@given(st.data(), st.integers(1, 800), st.integers(2, 48))
def test_pyramiddrop_averages_the_budget_or_less(data: st.DataObject, tokens: int, depth: int) -> None:
    budget = data.draw(st.integers(1, tokens))
    try:
        schedule = pyramiddrop_schedule(tokens, depth, budget, PYRAMID)
    except BudgetError:
        least = pyramiddrop_schedule(tokens, depth, -(-(tokens + depth - 1) // depth), PYRAMID)
        assert least.average > budget
        return
    assert schedule.average <= budget
    assert min(schedule.per_layer) >= 1
    if budget == tokens:
        assert schedule.average == tokens


@pytest.mark.parametrize("budget", [0, -1, 21])
def test_budgets_that_an_image_does_not_have(budget: int) -> None:
    for make, settings in (
        (fastv_schedule, FASTV),
        (sparsevlm_schedule, SPARSE),
        (pyramiddrop_schedule, PYRAMID),
    ):
        with pytest.raises(BudgetError, match=rf"budget is {budget}, it must be in 1\.\.20"):
            make(20, 8, budget, settings)  # type: ignore[operator]


class TestMethodsCommand:
    def test_json_tells_them_from_the_rules(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["methods", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [item["name"] for item in found if item["exported"]] == list(POLICIES)
        inside = {item["name"]: item for item in found if not item["exported"]}
        assert list(inside) == list(INNER)
        assert set(INNER_METHODS) == set(INNER) - {"refetch"}
        assert inside["fastv"]["settings"] == {"layer": "2"}
        assert [name for name, item in inside.items() if item["experimental"]] == ["refetch"]
        assert len({frozenset(item) - {"experimental"} for item in found}) == 1

    def test_the_table_has_a_block_of_its_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["methods"]) == 0
        text = capsys.readouterr().out
        rules, inside = text.split("inside the language model", 1)
        assert "holov-official" in rules
        for name in INNER:
            assert name not in rules
            assert name in inside
        assert inside.count("not exported") == len(INNER)
        assert inside.count("experimental") == 1
