"""Estimates: against counts done by hand, against limits of physics, and against published figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holov_export.errors import BudgetError, UnknownNameError, UsageError
from holov_export.estimate.memory import memory_of
from holov_export.estimate.report import Estimate, estimate
from holov_export.estimate.roofline import SHARES, Machine, Shares, format_of
from holov_export.estimate.shapes import ModelShape, VisionShape, shape_from_name, shape_from_spec, shape_names
from holov_export.estimate.stages import STEP_KERNELS, layer_rows, prefill_seconds, step_seconds, vision_seconds
from holov_export.policies import HolovPaperPolicy, HolovPolicy, NoSelection, ScopePolicy, SelectionPolicy
from holov_export.spec import Cut, DecoderPrecision, ModelSpec
from holov_export.targets import EngineTarget, target_from_name

ROOT = Path(__file__).resolve().parent.parent
LLAVA = shape_from_name("llava-1.5-7b")
NANO, ORIN, H200 = (target_from_name(name) for name in ("jetson-orin-nano-8gb", "jetson-agx-orin-64gb", "h200"))
#: kernels that reach every peak and cost nothing to launch: times are then exact counts
IDEAL = Shares(product=1, weight_only=1, attention=1, bandwidth=1, kernel_seconds=0, tile=(1, 1))


def with_peaks(target: EngineTarget, *, bandwidth: float | None = None, rate: float | None = None) -> EngineTarget:
    """`target` with another bandwidth (GB/s) or rate of every type (TFLOP/s)."""
    rates = target.rates if rate is None else target.rates.model_copy(update=dict.fromkeys(("fp32", "fp16"), rate))
    return target.model_copy(update={"rates": rates, "bandwidth_gbs": bandwidth or target.bandwidth_gbs})


def on(target: EngineTarget, **settings: object) -> Estimate:
    """LLaVA-1.5-7B in fp16 with an int4 decoder."""
    return estimate(LLAVA, target, precision="fp16", decoder=DecoderPrecision.INT4, **settings)  # type: ignore[arg-type]


def vision_of(spec: ModelSpec, policy: SelectionPolicy) -> VisionShape:
    return shape_from_spec(spec, policy).vision


def late(**changes: bool) -> ModelShape:
    """LLaVA-1.5-7B with a rule that reads features."""
    return LLAVA.model_copy(update={"vision": LLAVA.vision.model_copy(update={"selects_early": False, **changes})})


class TestShapes:
    def test_parameters_are_those_of_the_checkpoint(self) -> None:
        """scripts/check_true_size writes a checkpoint of LLaVA-1.5-7B's size; ours lacks CLIP's unused last layer."""
        result = json.loads((ROOT / "benchmarks/results/true-size-export.json").read_text(encoding="utf-8"))
        decoder = LLAVA.decoder
        language = decoder.layers * decoder.layer_parameters + 2 * decoder.vocab_size * decoder.width
        unused = 1024 * (4 * 1024 + 2 * 4096)
        mine = LLAVA.vision_parameters + language + unused
        assert mine == pytest.approx(result["checkpoint_apparent_bytes"] / 2, rel=1e-3)

    def test_a_shape_follows_from_a_specification(self, llava_spec: ModelSpec) -> None:
        shape = shape_from_spec(llava_spec, HolovPolicy())
        vision, decoder = llava_spec.vision, llava_spec.decoder
        assert shape.vision.rows == vision.tokens + 1
        assert shape.vision.layers == vision.feature_layer + 1
        assert shape.vision.patch_values == 3 * vision.patch_size**2
        assert shape.vision.projector_inner == decoder.width
        assert shape.vision.selects_early
        assert (shape.decoder.kv_heads, shape.decoder.mlp_width) == (decoder.kv_heads, decoder.mlp_width)
        assert not vision_of(llava_spec, HolovPaperPolicy()).selects_early
        assert not vision_of(llava_spec, HolovPaperPolicy()).projects_kept

    def test_rules_differ_in_what_runs_for_kept_rows_only(self, llava_spec: ModelSpec) -> None:
        """As the graphs do: scope reads the feature layer's rows, the plain encoder drops rows before the projector."""
        scope, plain = vision_of(llava_spec, ScopePolicy()), vision_of(llava_spec, NoSelection())
        assert (scope.selects_early, scope.projects_kept, scope.greedy) == (False, True, True)
        assert (plain.selects_early, plain.projects_kept, plain.greedy) == (False, True, False)
        assert not vision_of(llava_spec, HolovPolicy()).greedy

    def test_the_names_that_ship(self) -> None:
        assert shape_names() == ("llava-1.5-13b", "llava-1.5-7b")
        assert shape_from_name("llava-1.5-13b").vision.rows == LLAVA.vision.rows
        with pytest.raises(UnknownNameError, match="no shape of 'llava-2'"):
            shape_from_name("llava-2")

    def test_a_damaged_file_is_said_to_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "x.json").write_text('{"name": "x"}', encoding="utf-8")
        monkeypatch.setattr("holov_export.estimate.shapes.data_folder", lambda name: tmp_path)
        with pytest.raises(UsageError, match=r"x.json' is damaged: "):
            shape_from_name("x")


class TestRoofline:
    def test_vision_counts_its_operations(self) -> None:
        """Where memory costs nothing, time is operations: counted by hand."""
        machine = Machine(with_peaks(ORIN, bandwidth=1e9, rate=1.0), IDEAL)
        seconds = vision_seconds(machine, LLAVA, format_of(machine.target, "fp16"), budget=576, batch=1)
        rows, width, mlp = 577, 1024, 4096
        layer = 2 * rows * (4 * width**2 + 2 * width * mlp) + 4 * rows**2 * width
        projector = 2 * 576 * (width * 4096 + 4096 * 4096)
        patches = 2 * rows * 588 * width
        assert seconds * 1e12 == pytest.approx(23 * layer + projector + patches, rel=1e-3)

    def test_selecting_early_saves_what_it_says(self) -> None:
        """Query, attention, output, MLP and projector run for 64 rows; keys and values for all 577."""
        machine = Machine(with_peaks(ORIN, bandwidth=1e9, rate=1.0), IDEAL)
        form = format_of(machine.target, "fp16")
        full, few = (vision_seconds(machine, LLAVA, form, budget=budget, batch=1) for budget in (576, 64))
        width, mlp, gone = 1024, 4096, 577 - 64
        layer = 2 * gone * (2 * width**2 + 2 * width * mlp) + 4 * gone * 577 * width
        projector = 2 * (576 - 64) * (width * 4096 + 4096 * 4096)
        # selecting all 576 still leaves CLS out of the last layer
        cls = 2 * (2 * width**2 + 2 * width * mlp) + 4 * 577 * width
        assert (full - few) * 1e12 == pytest.approx(layer - cls + projector, rel=1e-3)

    def test_a_rule_that_reads_features_saves_nothing_in_the_tower(self) -> None:
        machine, form = Machine(ORIN), format_of(ORIN, "fp16")
        few = vision_seconds(machine, late(), form, budget=64, batch=1)
        full = vision_seconds(machine, late(), form, budget=576, batch=1)
        assert few > full  # the selection itself
        assert vision_seconds(machine, LLAVA, form, budget=64, batch=1) < few

    def test_a_rule_that_reads_the_feature_layer_saves_the_projector(self) -> None:
        machine = Machine(with_peaks(ORIN, bandwidth=1e9, rate=1.0), IDEAL)
        form = format_of(machine.target, "fp16")
        all_rows, kept = (
            vision_seconds(machine, late(projects_kept=flag), form, budget=64, batch=1) for flag in (False, True)
        )
        assert (all_rows - kept) * 1e12 == pytest.approx(2 * 512 * (1024 * 4096 + 4096**2), rel=1e-3)

    def test_a_greedy_rule_costs_a_round_of_kernels_for_each_token(self) -> None:
        """And each reads the similarities of all pairs of tokens."""
        launches = Machine(with_peaks(H200, bandwidth=1e9, rate=1e9), Shares())
        form = format_of(launches.target, "fp16")
        rule = late(projects_kept=True, greedy=True)
        few, more = (vision_seconds(launches, rule, form, budget=budget, batch=1) for budget in (64, 192))
        assert more - few == pytest.approx(128 * STEP_KERNELS * SHARES.kernel_seconds, rel=0.01)
        moved = Machine(with_peaks(H200, bandwidth=1.0, rate=1e9), IDEAL)
        with_loop, without = (
            vision_seconds(moved, late(projects_kept=True, greedy=flag), form, budget=64, batch=2)
            for flag in (True, False)
        )
        written = 2 * 576 * 576 * 4
        assert (with_loop - without) * 1e9 == pytest.approx(64 * written + written + 2 * 2 * 576 * 1024 * 4, rel=0.3)

    def test_prefill_counts_its_operations(self) -> None:
        machine = Machine(with_peaks(ORIN, bandwidth=1e9, rate=1.0), IDEAL)
        form = format_of(machine.target, "fp16")
        seconds = prefill_seconds(machine, LLAVA, form, form, prompt=608, batch=1)
        decoder = LLAVA.decoder
        products = 2 * 608 * decoder.layers * decoder.layer_parameters + 2 * decoder.width * decoder.vocab_size
        attention = 4 * 608 * 304 * decoder.width * decoder.layers
        assert seconds * 1e12 == pytest.approx(products + attention, rel=1e-3)

    def test_a_step_moves_every_weight_and_the_cache_once(self) -> None:
        machine = Machine(with_peaks(ORIN, bandwidth=100.0, rate=1e9), IDEAL)
        form = format_of(machine.target, "fp16")
        decoder = LLAVA.decoder
        weights = 2 * (decoder.layers * decoder.layer_parameters + decoder.width * decoder.vocab_size)
        cache = 2 * 2 * decoder.layers * decoder.width * 1001
        seconds = step_seconds(machine, LLAVA, form, form, past=1000, batch=1)
        assert seconds * 100e9 == pytest.approx(weights + cache, rel=2e-3)
        # eight sequences read the weights once and eight caches
        eight = step_seconds(machine, LLAVA, form, form, past=1000, batch=8)
        assert eight * 100e9 == pytest.approx(weights + 8 * cache, rel=1e-2)

    def test_shares_divide_the_peaks(self) -> None:
        half = Shares(product=0.5, weight_only=0.5, attention=0.5, bandwidth=0.5, kernel_seconds=0, tile=(1, 1))
        form = format_of(ORIN, "fp16")
        whole = vision_seconds(Machine(ORIN, IDEAL), LLAVA, form, budget=100, batch=2)
        assert vision_seconds(Machine(ORIN, half), LLAVA, form, budget=100, batch=2) == pytest.approx(2 * whole)

    def test_a_small_product_does_not_fill_a_large_gpu(self) -> None:
        form = format_of(H200, "fp16")
        machine, filled = Machine(H200), Machine(H200.model_copy(update={"multiprocessors": 1}))
        assert machine.product(form, 64, 4096, 1024) > filled.product(form, 64, 4096, 1024)
        assert machine.product(form, 6400, 4096, 4096) == filled.product(form, 6400, 4096, 4096)

    def test_a_rate_that_is_not_there_is_no_zero(self) -> None:
        with pytest.raises(ValueError, match="has no rate for fp8"):
            format_of(ORIN, "fp8")

    @settings(max_examples=40)
    @given(budget=st.integers(1, 574), batch=st.integers(1, 16), name=st.sampled_from(["h200", "l4", ORIN.name]))
    def test_fewer_tokens_never_take_longer(self, budget: int, batch: int, name: str) -> None:
        target = {"h200": H200, ORIN.name: ORIN}.get(name) or target_from_name(name)
        machine, form = Machine(target), format_of(target, "fp16")
        less, more = (vision_seconds(machine, LLAVA, form, budget=each, batch=batch) for each in (budget, budget + 1))
        assert less <= more
        less, more = (
            prefill_seconds(machine, LLAVA, form, form, prompt=each, batch=batch) for each in (budget, budget + 1)
        )
        assert less <= more


class TestMemory:
    def test_the_parts_are_counted_by_hand(self) -> None:
        form = format_of(ORIN, "fp16")
        memory = memory_of(LLAVA, form, form, form, prompt=608, context=4096, batch=2)
        assert memory.kv_cache == 2 * 4096 * 2 * 32 * 4096 * 2
        assert memory.embeddings == 2 * 32064 * 4096
        assert memory.decoder_weights == pytest.approx(2 * (6.4762e9 + 32064 * 4096), rel=1e-3)
        assert memory.vision_weights == pytest.approx(623e6, rel=0.01)
        assert memory.total == sum(memory.model_dump().values())

    def test_four_bits_are_four_and_a_half(self) -> None:
        four, half = format_of(ORIN, "int4"), format_of(ORIN, "fp16")
        small = memory_of(LLAVA, half, four, four, prompt=1, context=1, batch=1)
        large = memory_of(LLAVA, half, half, half, prompt=1, context=1, batch=1)
        assert small.decoder_weights / large.decoder_weights == pytest.approx(4.5 / 16, rel=1e-6)
        assert small.kv_cache == large.kv_cache

    def test_keys_and_values_of_8_bits_are_half(self) -> None:
        full, small = on(ORIN), on(ORIN, kv_cache="int8")
        for row, other in zip(full.rows, small.rows, strict=True):
            assert 2 * other.memory.kv_cache == row.memory.kv_cache
            assert other.memory_bytes == row.memory_bytes - other.memory.kv_cache
            assert other.decode_tokens_per_s > row.decode_tokens_per_s
        assert any(line.endswith("keys and values 1") for line in small.assumptions)

    def test_a_tied_table_is_held_once(self) -> None:
        tied = LLAVA.model_copy(update={"decoder": LLAVA.decoder.model_copy(update={"tied": True})})
        form = format_of(ORIN, "fp16")
        assert memory_of(tied, form, form, form, prompt=1, context=1, batch=1).embeddings == 0


class TestReport:
    def test_rows_are_all_a_third_a_ninth_and_the_asked_ones(self) -> None:
        assert [row.budget for row in on(ORIN).rows] == [576, 192, 64]
        assert [row.budget for row in on(ORIN, budgets=(100, 64, 576, 1)).rows] == [576, 192, 100, 64, 1]

    def test_a_row_adds_up(self) -> None:
        for row in on(ORIN, batch=4).rows:
            assert row.ttft_ms == pytest.approx(row.vision_ms + row.prefill_ms)
            assert row.memory_bytes == row.memory.total
            assert row.prompt_kv_bytes == 4 * (row.budget + 32) * 524288

    def test_pruning_pays_where_it_should(self) -> None:
        """A ninth of the tokens: prefill falls several times, the tower hardly."""
        full, _, few = on(ORIN).rows
        assert full.prefill_ms / few.prefill_ms > 4
        assert 1.0 < full.vision_ms / few.vision_ms < 1.1
        assert full.decode_tokens_per_s < few.decode_tokens_per_s < 1.2 * full.decode_tokens_per_s

    def test_what_fits_and_with_which_context(self) -> None:
        assert on(H200).fits
        assert on(H200).context_that_fits == 4096
        found = on(NANO)
        assert not found.fits
        room = found.context_that_fits
        assert 608 < room < 4096
        assert on(NANO, context=room).fits
        assert not on(NANO, context=room + 2).fits
        half = estimate(LLAVA, NANO, precision="fp16", decoder=DecoderPrecision.FP16)
        assert half.context_that_fits == 0

    def test_assumptions_name_every_share(self) -> None:
        said = " ".join(on(NANO).assumptions)
        for share in (SHARES.product, SHARES.weight_only, SHARES.attention, SHARES.bandwidth):
            assert f"{share:.0%}" in said
        assert "nothing of this was measured" in said
        assert "2 of 8 GiB, shared by CPU and GPU" in said
        assert "TF32" not in said
        full = estimate(LLAVA, ORIN, precision="fp32", decoder=DecoderPrecision.FP16)
        assert "TF32" in " ".join(full.assumptions)
        assert "attention reaches 35% of the fp16 rate, in float32 of the fp32 rate" in " ".join(full.assumptions)
        assert "4-bit" not in " ".join(
            estimate(LLAVA, H200, precision="fp16", decoder=DecoderPrecision.FP16).assumptions
        )

    @pytest.mark.parametrize(
        ("target", "precision", "decoder", "said"),
        [
            (ORIN.name, "fp8", "int4", "vision engine cannot be fp8 .* capability 8.7 has no fp8 rate"),
            (f"{ORIN.name}-jetpack5", "bf16", "fp16", "engine cannot be bf16 .* TensorRT 8.5.2 are not built in it"),
            ("jetson-agx-thor", "int8", "fp16", "vision engine cannot be int8"),
        ],
    )
    def test_a_precision_that_the_target_lacks(self, target: str, precision: str, decoder: str, said: str) -> None:
        board = target_from_name(target)
        with pytest.raises(UsageError, match=said) as caught:
            estimate(LLAVA, board, precision=precision, decoder=DecoderPrecision(decoder))  # type: ignore[arg-type]
        assert caught.value.hint == f"It has: {', '.join(board.precisions)}."

    def test_a_precision_that_its_tensorrt_lacks(self) -> None:
        board = ORIN.model_copy(update={"precisions": ("fp16",)})
        with pytest.raises(UsageError, match=r"engines of TensorRT 10.3 are not built in it there"):
            estimate(LLAVA, board, precision="int8", decoder=DecoderPrecision.FP16)

    def test_the_decoder_needs_the_gpu_and_not_tensorrt(self) -> None:
        board = target_from_name(f"{ORIN.name}-jetpack5")
        assert not {"int4", "bf16"} & set(board.precisions)
        for precision in (DecoderPrecision.INT4, DecoderPrecision.BF16):
            found = estimate(LLAVA, board, precision="fp16", decoder=precision)
            assert found.decoder_precision is precision
        old = board.model_copy(update={"rates": board.rates.model_copy(update={"bf16": None})})
        with pytest.raises(UsageError, match=r"decoder cannot be bf16 .* has no bf16 rate in its target file"):
            estimate(LLAVA, old, precision="fp16", decoder=DecoderPrecision.BF16)

    def test_a_greedy_rule_is_named_among_the_assumptions(self) -> None:
        found = estimate(late(greedy=True), ORIN, precision="fp16", decoder=DecoderPrecision.FP16)
        assert f"small ones and a loop of {STEP_KERNELS} for each token of the budget" in " ".join(found.assumptions)

    @pytest.mark.parametrize("budget", [0, -1, 577])
    def test_a_budget_outside_the_model(self, budget: int) -> None:
        with pytest.raises(BudgetError, match=rf"the budget {budget} is outside 1..576"):
            on(ORIN, budgets=(budget,))

    def test_a_context_that_the_model_was_not_made_for(self) -> None:
        with pytest.raises(UsageError, match="5000 tokens is more than the 4096"):
            on(ORIN, context=5000)

    def test_a_prompt_past_the_context(self) -> None:
        with pytest.raises(UsageError, match=r"a prompt of 608 tokens .* exceeds the context of 600"):
            on(ORIN, context=600)

    def test_every_target_gives_an_estimate_in_what_it_recommends(self) -> None:
        for path in sorted((ROOT / "engines").glob("*.toml")):
            target = target_from_name(str(path))
            for precision in set(target.precisions) - {"int4"}:
                found = estimate(LLAVA, target, precision=precision, decoder=DecoderPrecision.FP16)
                assert all(0 < row.ttft_ms < 60_000 for row in found.rows)


class TestPublished:
    @pytest.fixture
    def script(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("check_estimates", ROOT / "scripts" / "check_estimates.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    def test_the_document_is_up_to_date(self) -> None:
        line = [sys.executable, str(ROOT / "scripts" / "check_estimates.py"), "--check"]
        ended = subprocess.run(
            line, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "ratio" in ended.stdout

    def test_two_thirds_of_what_counts_is_within_the_factor(self, script: ModuleType) -> None:
        counted = [item for data in script.read_published() if data["counted"] for item in script.figures_of(data)]
        times = script.times_of(counted)
        assert len(times) == 15
        assert sum(item.close for item in times) >= 2 / 3 * len(times)

    def test_what_came_after_the_shares_were_settled_is_close(self, script: ModuleType) -> None:
        (later,) = [data for data in script.read_published() if not data["counted"]]
        assert all(item.close for item in script.figures_of(later))

    def test_figures_name_their_source_and_shapes_theirs(self, script: ModuleType) -> None:
        for data in script.read_published():
            assert data["sources"] and all("https://" in source for source in data["sources"])
            assert all(ModelShape.model_validate(shape).sources for shape in data["shapes"])

    def test_a_shape_of_another_picture_is_refused(self, script: ModuleType) -> None:
        data = script.read_published()[0]
        data["rows"][0]["image_tokens"] = 1
        with pytest.raises(ValueError, match="has 265 image tokens, the row says 1"):
            script.figures_of(data)

    def test_a_document_that_differs_is_reported_and_left_alone(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stale = tmp_path / "estimates.md"
        stale.write_text("old", encoding="utf-8")
        monkeypatch.setattr(script, "DOCUMENT", stale)
        monkeypatch.setattr(script, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["check_estimates.py", "--check"])
        assert script.main() == 1
        assert "estimates.md is out of date" in capsys.readouterr().out
        assert stale.read_text(encoding="utf-8") == "old"
        monkeypatch.setattr(sys, "argv", ["check_estimates.py"])
        assert script.main() == 0
        assert stale.read_text(encoding="utf-8") == script.document()


class TestCuts:
    """Rows that go before the last layer."""

    @staticmethod
    def with_cuts(*cuts: Cut, early: bool = True) -> ModelShape:
        vision = LLAVA.vision.model_copy(update={"cuts": cuts, "selects_early": early, "projects_kept": not early})
        return LLAVA.model_copy(update={"vision": vision})

    def test_rows_of_each_layer(self) -> None:
        assert layer_rows(LLAVA.vision, 64) == [(577, 577)] * 22 + [(577, 64)]
        one = self.with_cuts(Cut(layer=12)).vision
        assert layer_rows(one, 64) == [(577, 577)] * 12 + [(577, 65)] + [(65, 65)] * 10
        late = self.with_cuts(Cut(layer=12), early=False).vision
        assert layer_rows(late, 64) == [(577, 577)] * 13 + [(65, 65)] * 10
        two = self.with_cuts(Cut(layer=12, keep=256), Cut(layer=22)).vision
        assert layer_rows(two, 64) == [(577, 577)] * 12 + [(577, 257)] + [(257, 257)] * 9 + [(257, 64)]
        assert layer_rows(two, 400)[13:] == [(401, 401)] * 9 + [(401, 400)]

    def test_an_earlier_cut_takes_less_time(self) -> None:
        machine = Machine(with_peaks(ORIN), IDEAL)
        form = format_of(ORIN, "fp16")
        shapes = [self.with_cuts(Cut(layer=layer)) for layer in (4, 8, 12, 16, 20, 22)]
        times = [vision_seconds(machine, shape, form, budget=64, batch=1) for shape in shapes]
        assert times == sorted(times)
        usual = vision_seconds(machine, LLAVA, form, budget=64, batch=1)
        assert times[-1] == pytest.approx(usual, rel=0.01)
        assert 0.5 < times[2] / usual < 0.7
