"""Which products of a vision graph have weights, and which of them decide, for every family and rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_bundles import family_bundle as shared_bundle
from family_bundles import family_bundle
from onnx import ModelProto, NodeProto, TensorProto, helper

from holov_export.bundle import Bundle
from holov_export.compile.graph_file import graph_from_file
from holov_export.errors import UsageError
from holov_export.pipeline import export_bundle
from holov_export.policies import HolovPolicy, policy_from_settings
from holov_export.quantize.linears import Linear, linears_of, matches, quantised_linears
from holov_export.request import ExportRequest, GraphRequest
from holov_export.spec import Precision

TOWER = "vision_tower.layers"
#: of a CLIP layer
PARTS = ("mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj")
PROJECTOR = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")


def linears_in(bundle: Bundle) -> tuple[Linear, ...]:
    return linears_of(graph_from_file(bundle.vision))


def deciding(bundle: Bundle) -> list[str]:
    return sorted(linear.name for linear in linears_in(bundle) if linear.deciding)


def query_and_key(*layers: int) -> list[str]:
    return [f"{TOWER}.{layer}.self_attn.{part}" for layer in layers for part in ("k_proj", "q_proj")]


class TestHolov:
    def test_every_product_is_found_once(self, exported_bundle: Bundle) -> None:
        linears = linears_in(exported_bundle)
        expected = {f"{TOWER}.{layer}.{part}" for layer in range(3) for part in PARTS} | set(PROJECTOR)
        assert {linear.name for linear in linears} == expected
        assert len(linears) == len(expected)
        spec = exported_bundle.manifest.plan.model
        shapes = {linear.name: (linear.rows, linear.columns) for linear in linears}
        assert shapes[f"{TOWER}.0.mlp.fc1"] == (spec.clip.width, spec.clip.mlp_width)
        assert shapes["multi_modal_projector.linear_1"] == (spec.clip.width, spec.decoder.width)

    def test_query_and_key_of_the_feature_layer_decide(self, exported_bundle: Bundle) -> None:
        assert deciding(exported_bundle) == query_and_key(2)

    def test_the_last_query_runs_for_cls_and_for_the_kept_rows(self, exported_bundle: Bundle) -> None:
        (query,) = (linear for linear in linears_in(exported_bundle) if linear.name == f"{TOWER}.2.self_attn.q_proj")
        assert len(set(query.nodes)) == len(set(query.activations)) == 2

    def test_query_key_and_value_share_their_activation(self, exported_bundle: Bundle) -> None:
        of_first = {
            linear.activations
            for linear in linears_in(exported_bundle)
            if linear.name.startswith(f"{TOWER}.0.self_attn.") and "out" not in linear.name
        }
        assert len(of_first) == 1


class TestOtherRules:
    def test_llava_next_with_holov_and_scope(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """scope reads the residual stream, which is no single product's; it runs the last MLP on a list of rows."""
        bundle = shared_bundle("llava_next", Precision.FP32, tmp_path_factory)
        assert [view.method for view in bundle.views] == ["holov", "scope"]
        for view in bundle.views:
            assert deciding(view) == query_and_key(2)
            assert len(linears_in(view)) == 20

    @pytest.mark.slow
    def test_rules_that_read_more_and_cuts(self, llava_checkpoint: Path, tmp_path: Path) -> None:
        rules = [GraphRequest(policy_from_settings(name), None) for name in ("scope", "holov-plus", "dart")]
        request = ExportRequest(
            model=str(llava_checkpoint),
            policy=HolovPolicy(),
            precision=Precision.FP32,
            decoder=None,
            output=tmp_path / "rules",
            verify=False,
            also=(*rules, GraphRequest(HolovPolicy(), "1:48,2")),
        )
        bundle, _ = export_bundle(request)
        assert {view.method: deciding(view) for view in bundle.views} == {
            "holov": query_and_key(2),
            "scope": query_and_key(2),
            "holov-plus": query_and_key(2),
            "dart": ["multi_modal_projector.linear_2", *query_and_key(2)],  # it compares the projector's rows
            "holov@1:48,2": query_and_key(1, 2),
        }


@pytest.mark.slow
class TestFamilies:
    def test_video_llava(self, tmp_path: Path) -> None:
        bundle = family_bundle(tmp_path, "video_llava").bundle
        assert [view.part for view in bundle.views] == ["image", "video"]
        for view in bundle.views:
            assert len(linears_in(view)) == 20
            assert deciding(view) == query_and_key(2)

    def test_qwen(self, tmp_path: Path) -> None:
        """Its rows are one list, so its products are Gemm nodes; there SCOPE reads what the merger's last one gives."""
        bundle = family_bundle(tmp_path, "qwen2_5_vl", also=("scope",)).bundle
        holov, scope = bundle.views
        assert deciding(holov) == ["visual.blocks.3.attn.qkv"]
        assert deciding(scope) == ["visual.blocks.3.attn.qkv", "visual.merger.mlp.2"]
        first, *rest = linears_in(holov)
        width = bundle.manifest.plan.model.vision.width
        assert (first.name, first.rows, first.columns) == ("visual.blocks.0.attn.qkv", width, 3 * width)
        assert len(rest) == 4 * 5 + 1  # qkv, proj, gate, up, down of each block and the merger's two; not the patches'


def toy_linear(name: str, *, decides: bool = False) -> Linear:
    return Linear(f"{name}.weight", 4, 4, (f"{name}/MatMul",), (f"{name}/in",), decides)


LINEARS = tuple(toy_linear(f"tower.layers.{n}.mlp.fc{m}") for n in (3, 30) for m in (1, 2))


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "found"),
        [("layers.3", 2), ("layers.30", 2), ("mlp.fc2", 2), ("tower", 4), ("ayers.3", 0), ("layers.3.mlp.fc1", 1)],
    )
    def test_whole_parts_match(self, pattern: str, found: int) -> None:
        assert sum(matches(pattern, linear) for linear in LINEARS) == found

    def test_what_is_left_is_quantised(self) -> None:
        left = quantised_linears((*LINEARS, toy_linear("tower.q_proj", decides=True)), ["layers.3"])
        assert left == LINEARS[2:]

    @pytest.mark.parametrize("pattern", ["layers.4", "", "."])
    def test_a_pattern_that_names_nothing(self, pattern: str) -> None:
        with pytest.raises(UsageError, match="names no product") as caught:
            quantised_linears(LINEARS, [pattern])
        assert "tower.layers.3.mlp.fc1" in caught.value.hint

    def test_nothing_left(self) -> None:
        with pytest.raises(UsageError, match="nothing is left"):
            quantised_linears(LINEARS, ["tower"])


def test_weights_that_are_computed_or_used_otherwise_are_no_linears() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "a_t"], ["b"], "attention"),
        helper.make_node("MatMul", ["second.weight", "x"], ["c"], "from the left"),
        helper.make_node("Add", ["a", "table"], ["saliency"]),
    ]
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT, [2, 2], [0.0] * 4)
        for name in ("first.weight", "second.weight", "table")
    ]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    (found,) = linears_of(helper.make_model(graph))
    assert (found.weight, found.nodes, found.activations, found.deciding) == ("first.weight", ("first",), ("x",), True)


def tiny_model(nodes: list[NodeProto], *weights: str) -> ModelProto:
    tensors = [helper.make_tensor(f"{name}.weight", TensorProto.FLOAT, [3, 2], [0.0] * 6) for name in weights]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))


def test_a_product_with_a_list_of_rows_is_a_gemm() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "up.weight", "bias"], ["a"], "up", transB=1),
        helper.make_node("Gemm", ["a", "down.weight"], ["saliency"], "down"),
    ]
    up, down = linears_of(tiny_model(nodes, "up", "down"))
    assert (up.rows, up.columns, up.activations, up.deciding) == (2, 3, ("x",), False)
    assert (down.rows, down.columns, down.activations, down.deciding) == (3, 2, ("a",), True)


def test_what_a_loop_that_decides_reads_from_outside_decides() -> None:
    inside = [
        helper.make_node("Add", ["scores", "best"], ["next"]),
        helper.make_node("Identity", ["go"], ["goes on"]),
    ]
    body = helper.make_graph(
        inside,
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", 9, [])],
        [helper.make_tensor_value_info("goes on", 9, []), helper.make_tensor_value_info("next", 1, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "read.weight"], ["scores"], "read"),
        helper.make_node("MatMul", ["x", "unread.weight"], ["other"], "unread"),
        helper.make_node("Loop", ["size", "", "start"], ["found"], "loop", body=body),
        helper.make_node("TopK", ["found", "k"], ["values", "order"]),
    ]
    found = {linear.name: linear.deciding for linear in linears_of(tiny_model(nodes, "read", "unread"))}
    assert found == {"read": True, "unread": False}
