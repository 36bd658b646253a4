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
    policy_from_settings,
)
from holov_export.signature import INPUTS, OUTPUTS, vision_signature
from holov_export.spec import OPSETS, CheckpointSource, DecoderPrecision, ExportPlan, Precision, VisionSpec

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

    def test_only_the_published_code_loses_tokens_at_full_budget(self) -> None:
        assert [name for name, policy in POLICIES.items() if not policy.lossless_at_full] == ["holov-official"]

    def test_which_rules_read_features(self) -> None:
        reading = [name for name, policy in POLICIES.items() if policy.features is not FeatureSource.NONE]
        assert reading == ["holov-paper", "scope"]

    @given(st.text())
    def test_any_text_as_a_method_is_a_policy_or_refused(self, method: str) -> None:
        if method in POLICIES:
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
