"""Specifications are frozen, refuse what they do not know, and survive a trip through JSON."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_bundle import plan

from holov_export.policies import (
    POLICIES,
    CropLayout,
    FeatureSource,
    HolovPaperPolicy,
    HolovPolicy,
    NoSelection,
    policy_from_settings,
)
from holov_export.signature import INPUTS, OUTPUTS, vision_signature
from holov_export.spec import (
    OPSETS,
    CheckpointSource,
    Cut,
    DecoderPrecision,
    ExportPlan,
    GraphPlan,
    Precision,
    VisionSpec,
    cuts_from_text,
)

VISION = plan().model.vision


def vision(**changes: object) -> VisionSpec:
    return VisionSpec.model_validate({**VISION.model_dump(), **changes})


def test_plan_survives_json() -> None:
    for decoder in (None, *DecoderPrecision):
        assert ExportPlan.model_validate_json(plan(decoder).model_dump_json()) == plan(decoder)


def test_grid_and_tokens() -> None:
    assert VISION.grid == (4, 4)
    assert VISION.tokens == 16
    assert vision(image_size=336, patch_size=14).tokens == 576


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "no multiple of patch_size"),
        ({"width": 33}, "no multiple of heads"),
        ({"feature_layer": 3}, "past the last of 3 layers"),
        ({"feature_layer": -2}, "greater than or equal to 0"),
        ({"activation": "relu"}, "Input should be"),
        ({"heads": 0}, "greater than or equal to 1"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_towers_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        vision(**changes)


def test_specifications_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        VISION.width = 64  # type: ignore[misc]


@pytest.mark.parametrize("opset", [16, 25])
def test_opset_out_of_range(opset: int) -> None:
    with pytest.raises(ValidationError, match="outside 17"):
        ExportPlan.model_validate({**plan().model_dump(), "opset": opset})


@pytest.mark.parametrize("precision", list(Precision))
def test_every_precision_has_an_opset_and_a_type(precision: Precision) -> None:
    ExportPlan.model_validate({**plan().model_dump(), "precision": precision, "opset": OPSETS[precision]})
    assert precision.dtype in ("float32", "float16", "bfloat16")


class TestPolicies:
    @pytest.mark.parametrize("method", list(POLICIES))
    def test_name_leads_to_its_class_and_back(self, method: str) -> None:
        policy = policy_from_settings(method)
        assert type(policy) is POLICIES[method]
        assert policy.method == method
        assert (
            ExportPlan.model_validate_json(plan().model_copy(update={"policy": policy}).model_dump_json()).policy
            == policy
        )

    @pytest.mark.parametrize("method", list(POLICIES))
    def test_every_policy_says_what_it_is(self, method: str) -> None:
        policy = POLICIES[method]
        assert policy.summary
        assert policy.source
        assert "\n" not in policy.summary

    def test_defaults(self) -> None:
        assert policy_from_settings("holov") == HolovPolicy(crops=16, layout=CropLayout.STRIPS)
        assert policy_from_settings("holov-paper") == HolovPaperPolicy(crops=16, layout=CropLayout.TILES, tau=1.0)

    def test_settings_come_as_text(self) -> None:
        policy = policy_from_settings("holov", {"crops": "8", "layout": "tiles"})
        assert policy == HolovPolicy(crops=8, layout=CropLayout.TILES)
        assert policy_from_settings("holov-paper", {"tau": "0.5"}) == HolovPaperPolicy(tau=0.5)

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("holv", {}),
            ("holov", {"crops": "0"}),
            ("holov", {"crops": "many"}),
            ("holov", {"layout": "spirals"}),
            ("holov", {"tau": "1"}),
            ("holov-paper", {"tau": "0"}),
            ("random", {"seed": "-1"}),
            ("cls-topk", {"crops": "4"}),
        ],
    )
    def test_wrong_settings_are_refused(self, method: str, settings: dict[str, str]) -> None:
        with pytest.raises(ValidationError):
            policy_from_settings(method, settings)

    def test_which_rules_lose_tokens_at_full_budget(self) -> None:
        losing = [name for name, policy in POLICIES.items() if not policy.lossless_at_full]
        assert losing == ["holov-official", "visionzip"], "zero rows, and tokens that are merged"

    def test_which_rules_read_no_features(self) -> None:
        blind = {name for name, policy in POLICIES.items() if policy.features is FeatureSource.NONE}
        assert blind == {"holov", "holov-official", "cls-topk", "uniform", "random"}

    @given(st.text())
    def test_any_text_as_a_method_is_a_policy_or_refused(self, method: str) -> None:
        if method in (*POLICIES, NoSelection().method):  # of a baseline, and no name that a user may give
            policy_from_settings(method)
        else:
            with pytest.raises(ValidationError):
                policy_from_settings(method)


def test_source_has_no_other_kinds() -> None:
    with pytest.raises(ValidationError):
        CheckpointSource.model_validate({"kind": "pickle", "name": "x"})


def test_signature_names_types_and_shapes() -> None:
    inputs, outputs = vision_signature(image_size=336, tokens=576, width=4096, dtype="float16")
    assert tuple(item.name for item in inputs) == INPUTS
    assert tuple(item.name for item in outputs) == OUTPUTS
    described = {item.name: (item.dtype, item.shape) for item in (*inputs, *outputs)}
    assert described == {
        "pixel_values": ("float16", ("batch", 3, 336, 336)),
        "budget": ("int64", (1,)),
        "quota": ("int64", ("batch",)),
        "visual_tokens": ("float16", ("batch", "budget", 4096)),
        "positions": ("int64", ("batch", "budget")),
        "counts": ("int64", ("batch",)),
        "saliency": ("float32", ("batch", 576)),
    }


#: the feature layer is 2
FOUR_LAYERS = vision(layers=4, feature_layer=2)


class TestCuts:
    @pytest.mark.parametrize(
        ("text", "cuts", "budget"),
        [
            ("1", ((1, None),), None),
            ("1:5", ((1, None),), 5),
            ("0:9,2", ((0, 9), (2, None)), None),
            ("0:9, 1:5,2:3", ((0, 9), (1, 5), (2, None)), 3),
            ("2", (), None),
            ("2:4", (), 4),
        ],
    )
    def test_text(self, text: str, cuts: tuple[tuple[int, int | None], ...], budget: int | None) -> None:
        expected = tuple(Cut(layer=layer, keep=keep) for layer, keep in cuts)
        assert cuts_from_text(text, FOUR_LAYERS) == (expected, budget)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "is no LAYER"),
            ("x", "is no LAYER"),
            ("1:", "is no LAYER"),
            ("-1", "is no LAYER"),
            ("3", "behind the feature layer"),
            ("1:17", "outside 1..16"),
            ("1:0", "outside 1..16"),
            ("0:5,2:6", "cannot keep more"),
        ],
    )
    def test_text_that_is_refused(self, text: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            cuts_from_text(text, FOUR_LAYERS)

    @pytest.mark.parametrize(
        ("method", "cuts", "reason"),
        [
            ("holov", (Cut(layer=1, keep=4), Cut(layer=0)), "must rise"),
            ("holov", (Cut(layer=0), Cut(layer=1)), "every cut but the last"),
            ("holov", (Cut(layer=0, keep=4),), "the last keeps the budget"),
            ("holov", (Cut(layer=0, keep=4), Cut(layer=1, keep=8), Cut(layer=2)), "cannot keep more"),
            ("holov-official", (Cut(layer=1),), "feature layer only"),
            ("uniform", (Cut(layer=0, keep=4), Cut(layer=1)), "decides once"),
        ],
    )
    def test_cuts_that_contradict(self, method: str, cuts: tuple[Cut, ...], reason: str) -> None:
        with pytest.raises(ValidationError, match=reason):
            GraphPlan(policy=policy_from_settings(method), cuts=cuts)

    def test_names(self) -> None:
        cuts = (Cut(layer=0, keep=9), Cut(layer=2))
        assert GraphPlan(policy=HolovPolicy(), cuts=cuts).name == "holov@0:9,2"
        assert GraphPlan(policy=HolovPolicy()).name == "holov"

    def test_graphs_of_a_plan(self) -> None:
        further = GraphPlan(policy=HolovPolicy(), cuts=(Cut(layer=1),))
        made = plan().model_copy(update={"also": (further,)})
        assert [graph.name for graph in made.graphs] == ["holov", "holov@1"]
        assert made.of_graph(further).method == "holov@1"
        assert made.of_graph(further).also == ()
        with pytest.raises(ValidationError, match="the same name"):
            ExportPlan.model_validate({**made.model_dump(), "also": [further.model_dump(), further.model_dump()]})
