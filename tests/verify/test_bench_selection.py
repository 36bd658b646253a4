"""What the selection takes of a profile, and how many operations a graph does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from holov_export.bundle import Bundle
from holov_export.policies import NoSelection, SelectionPolicy, policy_from_settings
from holov_export.runtime.preprocess import pixels_from_images
from holov_export.spec import ExportPlan, ModelSpec, Precision
from holov_export.verify.bench_selection import (
    node_times,
    ort_selection_share,
    share_of,
    tensorrt_selection_share,
)
from holov_export.verify.operations import operations_of
from holov_export.verify.pictures import default_pictures
from holov_export.vision.clip import LlavaVision
from holov_export.vision.plain import PlainVision


class TestShare:
    def test_of_nodes(self) -> None:
        layers = [
            ("vision_tower/layers/0/mlp/fc1/MatMul", 6.0),
            ("selection/quotas/Floor", 1.0),
            ("selection/TopK", 2.0),
            ("Reshape", 1.0),
        ]
        found = share_of(layers, source="x", runs=2)
        assert (found.share, found.mixed, found.total_ms, found.runs) == (0.3, 0.0, 5.0, 2)

    @pytest.mark.parametrize(
        "name",
        [
            "selection/quotas/Mul + selection/quotas/Floor",
            "PWN(PWN(selection/Less, selection/Where), selection/Cast_1)",
            "{ForeignNode[selection/quotas/Mul...selection/Where_3]}",
            "Reformatting CopyNode for Input Tensor 0 to selection/TopK",
            "selection/TopK_1 [TopK]",
        ],
    )
    def test_names_that_tensorrt_joins_from_selection_nodes_count_whole(self, name: str) -> None:
        found = share_of([(name, 1.0), ("vision_tower/layers/0/mlp/fc1/MatMul", 3.0)], source="x", runs=1)
        assert (found.share, found.mixed) == (0.25, 0.0)

    @pytest.mark.parametrize(
        "name",
        [
            "selection/Where + vision_tower/layers/22/self_attn/q_proj/MatMul",
            "{ForeignNode[vision_tower/embeddings/Add...multi_modal_projector/Where]}",
        ],
    )
    def test_a_layer_that_may_hold_others_is_mixed(self, name: str) -> None:
        """A region is named by its ends: the selection may lie between them, so zero would be a lie."""
        found = share_of([(name, 1.0), ("selection/TopK", 1.0), ("other/MatMul", 2.0)], source="x", runs=1)
        assert (found.share, found.mixed) == (0.25, 0.25)

    def test_a_module_of_another_name_is_no_selection(self) -> None:
        layers = [("preselection/Mul", 1.0), ("tower/selection_like/Mul", 1.0), ("a/selection/Mul", 1.0)]
        assert share_of(layers, source="x", runs=1).share == 0.0

    def test_no_time_is_an_error_and_not_zero(self) -> None:
        with pytest.raises(ValueError, match="no time"):
            share_of([], source="x", runs=1)

    def test_the_first_profiled_run_of_tensorrt_does_not_count(self) -> None:
        runs = iter([[("selection/TopK", 99.0)], *[[("selection/TopK", 1.0), ("a/MatMul", 3.0)]] * 3])
        found = tensorrt_selection_share(lambda: next(runs), runs=3)
        assert (found.share, found.total_ms) == (0.25, 4.0)


def test_of_an_onnx_runtime_profile_the_last_runs_and_the_kernels_count() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "dur": 5000},
        {"cat": "Node", "name": "a/MatMul_fence_before", "dur": 700},
        *({"cat": "Node", "name": "a/MatMul_kernel_time", "dur": dur} for dur in (9000, 1000, 2000)),
        *({"cat": "Node", "name": "selection/TopK_kernel_time", "dur": dur} for dur in (8000, 500, 250)),
    ]
    assert node_times(events, runs=2) == [("a/MatMul", 3.0), ("selection/TopK", 0.75)]


def test_what_a_loop_runs_is_not_counted_twice() -> None:
    def event(name: str, op: str, ts: int, dur: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op}}

    events = [
        event("a/MatMul", "MatMul", 0, 1000),
        event("body/ArgMax", "ArgMax", 1100, 300),
        event("body/Mul", "Mul", 1500, 400),
        event("selection/Loop", "Loop", 1050, 900),
        event("selection/TopK", "TopK", 2000, 100),
    ]
    assert node_times(events, runs=1) == [("a/MatMul", 1.0), ("selection/Loop", 0.9), ("selection/TopK", 0.1)]


def test_a_real_profile_has_the_selection_in_it(exported_bundle: Bundle) -> None:
    model = exported_bundle.manifest.plan.model
    pixels = pixels_from_images([picture for _, picture in default_pictures()[:2]], model.image)
    found = ort_selection_share(exported_bundle, pixels, 7, provider="cpu", threads=1, runs=3)
    assert 0 < found.share < 1
    assert found.total_ms > 0
    assert (found.source, found.runs, found.mixed) == ("onnxruntime profiler", 3, 0.0)


class TestOperations:
    def plan(self, spec: ModelSpec, policy: SelectionPolicy) -> ExportPlan:
        source = {"kind": "local", "name": "random"}
        return ExportPlan.model_validate(
            {"model": spec, "source": source, "policy": policy, "precision": Precision.FP32, "decoder": None}
        )

    @pytest.mark.parametrize("budget", [1, 7, 64])
    @pytest.mark.parametrize("method", ["holov", "holov-paper", "uniform", "none"])
    def test_are_those_that_torch_counts(self, llava_spec: ModelSpec, method: str, budget: int) -> None:
        policy = policy_from_settings(method)
        module: torch.nn.Module = LlavaVision(
            llava_spec, policy_from_settings("uniform" if method == "none" else method)
        )
        if isinstance(policy, NoSelection):
            assert isinstance(module, LlavaVision)
            module = PlainVision(module)
        side = llava_spec.vision.image_size
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.02)
        counter = FlopCounterMode(display=False)
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # fused kernels are not counted
        with torch.no_grad(), math, counter:
            module(torch.randn(3, 3, side, side), torch.tensor([budget]), torch.full((3,), budget))
        # torch counts the scores of the CLS row, [1, T], as it counts everything; the paper's rule multiplies features
        counted, ours = counter.get_total_flops() / 3, operations_of(self.plan(llava_spec, policy), budget)
        if method == "holov-paper":
            assert ours <= counted < 1.2 * ours
        else:
            assert ours == counted

    def test_at_true_size_they_are_the_known_number(self, llava_spec: ModelSpec) -> None:
        sizes = {"image_size": 336, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096}
        vision = llava_spec.vision.model_copy(update={**sizes, "feature_layer": 22})
        decoder = llava_spec.decoder.model_copy(update={"width": 4096})
        spec = llava_spec.model_copy(update={"vision": vision, "decoder": decoder})
        # 2 * (576 * 588 * 1024 + 23 * (577 * 12 * 1024^2 + 2 * 577^2 * 1024) + 576 * (1024 * 4096 + 4096^2))
        assert operations_of(self.plan(spec, NoSelection()), 576) == 390193049600
        pruned = [operations_of(self.plan(spec, policy_from_settings("holov")), budget) for budget in (1, 64, 576)]
        assert pruned == sorted(pruned)
        assert pruned[1] / 1e12 == pytest.approx(0.357, abs=5e-4)
        assert pruned[2] / 390193049600 == pytest.approx(1, abs=1e-3)
