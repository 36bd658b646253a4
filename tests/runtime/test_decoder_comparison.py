"""A bundle's decoder against transformers: a right one passes, and each kind of wrong one is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import TinyLlava, write_checkpoint
from toys import write_toy_bundle

from holov_export.bundle import Bundle
from holov_export.errors import CheckpointError
from holov_export.export import decoder_onnx
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.decoder_onnx import decoder_from_checkpoint
from holov_export.export.decoder_weights import EMBEDDING, language_tensors
from holov_export.spec import DecoderPrecision, ModelSpec
from holov_export.verify import answers
from holov_export.verify.answers import DecoderComparison, compare_decoder, default_prompts

FP32, FP16, INT4 = DecoderPrecision.FP32, DecoderPrecision.FP16, DecoderPrecision.INT4


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sizes and the same tokenizer, other weights."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llava", TinyLlava(seed=1))


def compared(bundle: Bundle, checkpoint: Path) -> DecoderComparison:
    comparison, reason = compare_decoder(bundle, checkpoint)
    assert comparison is not None, reason
    assert reason == ""
    return comparison


def test_the_right_decoder_is_identical(answering_bundle: Bundle, llava_checkpoint: Path) -> None:
    comparison = compared(answering_bundle, llava_checkpoint)
    assert comparison == DecoderComparison(
        precision=FP32, prompts=3, new_tokens=8, identical=3, first_token_same=3, passed=True
    )


def test_the_decoder_of_another_checkpoint_fails(answering_bundle: Bundle, other_checkpoint: Path) -> None:
    comparison = compared(answering_bundle, other_checkpoint)
    assert not comparison.passed
    assert comparison.identical == 0


def test_a_head_taken_out_of_an_early_layer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's own silent mistake, let through on purpose."""
    checkpoint = write_checkpoint(tmp_path / "clash", TinyLlava(vocab=480, mlp=480))
    model = spec_from_checkpoint(checkpoint, "clash")
    monkeypatch.setattr(decoder_onnx, "check_head_width", lambda tensors, vocab_size: None)
    decoder_from_checkpoint(checkpoint, tmp_path / "decoder", model.decoder, FP32)
    bundle = write_toy_bundle(tmp_path / "bundle", model, checkpoint, decoder=tmp_path / "decoder")
    assert not compared(bundle, checkpoint).passed


def test_rows_that_are_changed_on_their_way_fail(
    answering_bundle: Bundle, llava_checkpoint: Path, tmp_path: Path
) -> None:
    """The decoder's own vision graph negates the rows: only the prompts with pictures can tell."""
    folder = shutil.copytree(answering_bundle.folder, tmp_path / "bundle")
    graph = onnx.load(folder / "decoder" / "vision.onnx")
    graph.graph.node[0].op_type = "Neg"
    del graph.graph.node[0].attribute[:]
    onnx.save(graph, folder / "decoder" / "vision.onnx")
    comparison = compared(Bundle(folder, answering_bundle.manifest), llava_checkpoint)
    assert not comparison.passed
    assert comparison.identical == 1


@pytest.mark.parametrize("precision", [FP16, INT4])
def test_other_precisions(
    llava_checkpoint: Path, other_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path, precision: DecoderPrecision
) -> None:
    decoder_from_checkpoint(llava_checkpoint, tmp_path / "decoder", llava_spec.decoder, precision)
    bundle = write_toy_bundle(
        tmp_path / "bundle",
        llava_spec,
        llava_checkpoint,
        decoder=tmp_path / "decoder",
        decoder_precision=precision,
    )
    right = compared(bundle, llava_checkpoint)
    assert right.precision is precision
    assert right.passed
    wrong = compared(bundle, other_checkpoint)
    assert wrong.first_token_same < wrong.prompts
    assert wrong.passed is (precision is INT4), "four bits are reported, not judged"


def test_what_is_judged() -> None:
    same, late, early = ([1, 2], [1, 2]), ([1, 2], [1, 3]), ([1, 2], [3, 2])
    cases = ((FP32, late, False), (FP16, late, True), (FP16, early, False), (INT4, early, True))
    for precision, pair, passed in cases:
        assert answers._judged(precision, [same, pair], 2).passed is passed
    assert not answers._judged(FP32, [], 2).passed
    assert not answers._judged(INT4, [], 2).passed


def test_prompts_hold_rows_like_words(answering_bundle: Bundle, llava_checkpoint: Path) -> None:
    table = language_tensors(llava_checkpoint)[EMBEDDING]
    first, again = (default_prompts(answering_bundle, table, 8) for _ in range(2))
    assert [prompt.counts for prompt in first] == [(16,), (16, 16), ()]
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left.rows, right.rows)
        np.testing.assert_array_equal(left.input_ids, right.input_ids)
    words = np.fromfile(table.shard, np.float32, count=table.shape[0] * table.shape[1], offset=table.begin)
    assert first[1].rows.std() == pytest.approx(words.std(), rel=0.1)


def test_own_prompts(answering_bundle: Bundle, llava_checkpoint: Path) -> None:
    prompts = default_prompts(answering_bundle, language_tensors(llava_checkpoint)[EMBEDDING], 8)[:1]
    comparison, _ = compare_decoder(answering_bundle, llava_checkpoint, prompts=prompts, new_tokens=3)
    assert comparison is not None
    assert (comparison.prompts, comparison.new_tokens, comparison.passed) == (1, 3, True)


def test_answers_are_compared_up_to_their_end(answering_bundle: Bundle, llava_checkpoint: Path) -> None:
    assert answers._to_end([5, 2, 7], (2,)) == [5, 2]
    assert answers._to_end([5, 7], (2,)) == [5, 7]
    assert answers._to_end([5, 7], ()) == [5, 7]


def test_what_is_not_compared(
    toy_bundle: Bundle, answering_bundle: Bundle, llava_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare_decoder(toy_bundle, llava_checkpoint) == (None, "the bundle has no decoder")
    comparison, reason = compare_decoder(answering_bundle, llava_checkpoint, limit_bytes=1000)
    assert comparison is None
    assert "the limit is 1e-06 GB" in reason
    plan = answering_bundle.manifest.plan
    for change, wanted in (
        ({"decoder": DecoderPrecision.BF16}, "bf16"),
        ({"decoder_provider": "cuda"}, "built for cuda"),
    ):
        manifest = answering_bundle.manifest.model_copy(update={"plan": plan.model_copy(update=change)})
        comparison, reason = compare_decoder(Bundle(answering_bundle.folder, manifest), llava_checkpoint)
        assert comparison is None
        assert wanted in reason
    monkeypatch.setattr(answers, "is_installed", lambda name: name != "torch")
    assert compare_decoder(answering_bundle, llava_checkpoint) == (None, "not installed: torch")


def test_a_checkpoint_without_weights(answering_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        compare_decoder(answering_bundle, tmp_path)
