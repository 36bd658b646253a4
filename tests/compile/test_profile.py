"""Profiles: what the user and the target say becomes min, opt and max of batch and budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holov_export.compile.profile import profiles_from_target, words
from holov_export.engine import ShapeProfile
from holov_export.errors import BudgetError
from holov_export.targets import list_targets, target_from_name

H200 = target_from_name("h200")


def test_the_target_says_what_nobody_asks_for() -> None:
    single, server = profiles_from_target(H200, 576)
    assert single == ShapeProfile(batch=(1, 1, 1), budget=(1, 64, 576))
    assert server.batch[2] > 1


def test_batch_and_budget_make_one_profile() -> None:
    (made,) = profiles_from_target(H200, 576, batch="1:4:16", budget="32:64:192")
    assert made == ShapeProfile(batch=(1, 4, 16), budget=(32, 64, 192))


def test_a_single_number_is_all_three() -> None:
    (made,) = profiles_from_target(H200, 576, batch="2", budget="64")
    assert made == ShapeProfile(batch=(2, 2, 2), budget=(64, 64, 64))


def test_shares_and_all_are_of_the_model() -> None:
    (made,) = profiles_from_target(H200, 144, batch="1", budget="1:1/9:all")
    assert made.budget == (1, 16, 144)


def test_what_is_not_said_comes_from_the_widest_profile() -> None:
    widest = max(H200.profiles, key=lambda item: item.batch.max)
    (made,) = profiles_from_target(H200, 576, budget="64")
    assert made.batch == (widest.batch.min, widest.batch.opt, widest.batch.max)


def test_several_profiles_keep_their_order() -> None:
    texts = ("batch=8,budget=64:64:64", "batch=1:1:1,budget=1:64:576")
    first, second = profiles_from_target(H200, 576, profiles=texts)
    assert (first.batch, second.budget) == ((8, 8, 8), (1, 64, 576))


def test_budgets_are_clamped_to_the_tokens() -> None:
    (made,) = profiles_from_target(H200, 100, batch="1", budget="64:200:576")
    assert made.budget == (64, 100, 100)


def test_profiles_that_clamping_makes_equal_are_one() -> None:
    texts = ("batch=1,budget=64:64:400", "batch=1,budget=64:64:576")
    assert len(profiles_from_target(H200, 100, profiles=texts)) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": "4:2:8"}, "4"),
        ({"batch": "0:1:2"}, "greater than or equal to 1"),
        ({"batch": "1:2"}, "1:2"),
        ({"batch": "1::2"}, "1::2"),
        ({"batch": "one"}, "one"),
        ({"budget": "64:32:128"}, "not in order"),
        ({"budget": "0"}, "budget"),
        ({"budget": "1/0"}, "1/0"),
        ({"profiles": ("batch=1",)}, "batch and budget"),
        ({"profiles": ("batch=1,budget=2,quota=3",)}, "batch and budget"),
        ({"profiles": ("batch=1,budget=64",), "batch": "2"}, "exclude"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(BudgetError) as caught:
        profiles_from_target(H200, 576, **settings)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert caught.value.hint


@given(tokens=st.integers(1, 4000), target=st.sampled_from(list_targets()))
def test_every_target_has_profiles_for_every_model(tokens: int, target: object) -> None:
    for made in profiles_from_target(target, tokens):  # type: ignore[arg-type]
        assert 1 <= made.batch[0] <= made.batch[1] <= made.batch[2]
        assert 1 <= made.budget[0] <= made.budget[1] <= made.budget[2] <= tokens


def test_words_of_a_profile() -> None:
    assert words(ShapeProfile(batch=(1, 4, 16), budget=(1, 64, 576))) == "batch 1:4:16, budget 1:64:576"
