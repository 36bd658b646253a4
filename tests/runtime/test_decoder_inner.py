"""Pruning inside the language model, on a random checkpoint, against plain code and transformers' own attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import TinyLlava, write_checkpoint
from runtime.inner_plain import Plain, causal, clustered
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from holov_export.errors import (
    BudgetError,
    EnvironmentFaultError,
    PromptError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.policies import Frozen
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.decoder_hf_inner import INNER_METHODS, InnerDecoder, inner_decoder
from holov_export.runtime.inner.methods import (
    FastVSettings,
    PyramidDropSettings,
    RefetchSettings,
    SparseVlmSettings,
)
from holov_export.runtime.inner.sparsevlm import cluster_means
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

PLACEHOLDER = 3
SIZES = TinyLlava(width=72, layers=7, heads=6, kv_heads=2, mlp=104, seed=12)
GREEDY = SamplingSettings(max_new_tokens=12)
N = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("inner") / "seven-layers", SIZES)


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> DecoderSpec:
    return spec_from_checkpoint(checkpoint, "seven-layers").decoder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlavaForConditionalGeneration:
    """With attention that can be looked at."""
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def plain_decoder(checkpoint: Path, spec: DecoderSpec) -> HfDecoder:
    return HfDecoder(checkpoint, spec, provider="cpu", threads=1)


def decoder_of(
    checkpoint: Path, spec: DecoderSpec, method: str, budget: int, settings: Frozen | None = None
) -> InnerDecoder:
    return inner_decoder(checkpoint, spec, method, budget, provider="cpu", threads=1, settings=settings)


def prompt_of(*counts: int, seed: int = 0) -> StitchedPrompt:
    """Text, images with text between them, and a question of seven tokens."""
    random = np.random.default_rng(seed)
    ids: list[int] = [1, *random.integers(260, 300, 3).tolist()]
    for count in counts:
        ids += [PLACEHOLDER] * count + [13 + seed]
    ids += random.integers(260, 330, 7).tolist()
    rows = (random.standard_normal((sum(counts), SIZES.width)) * 0.4).astype(np.float32)
    return StitchedPrompt(np.array(ids, np.int64), rows, counts, PLACEHOLDER, "")


PROMPTS = {
    "one image": prompt_of(N),
    "another": prompt_of(N, seed=1),
    "two images": prompt_of(N, N, seed=2),
    "two sizes": prompt_of(N, 29, seed=3),
    "an image of one token": prompt_of(1, seed=4),
}


@pytest.mark.parametrize("method", INNER_METHODS)
def test_nothing_changes_at_full_budget(
    method: str, checkpoint: Path, spec: DecoderSpec, plain_decoder: HfDecoder
) -> None:
    for prompt in PROMPTS.values():
        if len(set(prompt.counts)) > 1:
            continue  # one budget cannot be full for both
        made = decoder_of(checkpoint, spec, method, prompt.counts[0])
        wanted = list(plain_decoder.stream(prompt, GREEDY))
        assert len(set(wanted)) > 4, "a model that repeats itself would prove little"
        assert list(made.stream(prompt, GREEDY)) == wanted
        warm = replace(GREEDY, temperature=1.3, top_k=40, seed=3)
        assert list(made.stream(prompt, warm)) == list(plain_decoder.stream(prompt, warm))
        assert made.prefill(prompt).stages == ()


CASES = [
    ("fastv", 11, FastVSettings()),
    ("fastv", 5, FastVSettings(layer=4)),
    ("sparsevlm", 16, SparseVlmSettings()),
    ("sparsevlm", 4, SparseVlmSettings(recycle=False)),
    ("pyramiddrop", 15, PyramidDropSettings()),
    ("pyramiddrop", 6, PyramidDropSettings(budget_is="last")),
]


@pytest.mark.parametrize(("method", "budget", "settings"), CASES)
@pytest.mark.parametrize("name", ["one image", "another", "two images", "two sizes"])
def test_logits_and_kept_tokens_of_a_plain_recomputation(
    method: str,
    budget: int,
    settings: Frozen,
    name: str,
    checkpoint: Path,
    spec: DecoderSpec,
    model: LlavaForConditionalGeneration,
) -> None:
    """Prefill and four more tokens, each recomputed from the beginning with whole attention maps and no cache."""
    prompt, made = PROMPTS[name], decoder_of(checkpoint, spec, method, budget, settings)
    schedules = [made.schedule(count) for count in prompt.counts]
    cuts = {cut.layer: [schedule.cut_at(cut.layer).keep for schedule in schedules] for cut in schedules[0].cuts}  # type: ignore[union-attr]
    recycle = not isinstance(settings, SparseVlmSettings) or settings.recycle

    def plain(new: list[int]) -> tuple[Plain, np.ndarray]:
        once = Plain(model, prompt, new, cuts, recycle=recycle)
        return once, once.logits(method)

    once, logits = plain([])
    prefill = made.prefill(prompt)
    assert {stage.layer: [kept.tolist() for kept in stage.kept] for stage in prefill.stages} == once.kept
    np.testing.assert_allclose(prefill.logits, logits, rtol=1e-4, atol=1e-4)
    text = len(prompt) - sum(prompt.counts)
    seen = [text + sum(counts) for counts in zip(*(schedule.per_layer for schedule in schedules), strict=True)]
    assert seen == once.lengths
    assert [prefill.cache.get_seq_length(layer) for layer in range(SIZES.layers)] == seen
    assert min(seen) < max(seen) == len(prompt)
    new: list[int] = []
    for token in made.stream(prompt, replace(GREEDY, max_new_tokens=5)):
        assert token == int(np.argmax(plain(new)[1]))
        new.append(token)
    assert len(new) == 5


def test_fastv_keeps_what_transformers_own_attention_says(
    checkpoint: Path, spec: DecoderSpec, model: LlavaForConditionalGeneration
) -> None:
    """The attention maps that transformers puts out, layer K - 1, last row, mean over heads."""
    for prompt in (PROMPTS["one image"], PROMPTS["two images"]):
        embeds = Plain(model, prompt, [], {}).embeds()[None]
        with torch.no_grad():
            attentions = model.model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
        for layer in (1, 2, 5):
            row = attentions[layer - 1][0].mean(0)[-1].numpy()
            made = decoder_of(checkpoint, spec, "fastv", 9, FastVSettings(layer=layer))
            (stage,) = made.prefill(prompt).stages
            assert stage.layer == layer
            for image, kept in zip(Plain(model, prompt, [], {}).images(), stage.kept, strict=True):
                best = sorted(sorted(image, key=lambda place: -row[place])[:9])
                assert kept.tolist() == best


@pytest.mark.parametrize("name", ["one image", "two images"])
def test_dropping_with_original_positions_is_masking(
    name: str, checkpoint: Path, spec: DecoderSpec, model: LlavaForConditionalGeneration
) -> None:
    """FastV against all tokens in all layers, where an attention mask hides the dropped ones from layer K on."""
    prompt = PROMPTS[name]
    made = decoder_of(checkpoint, spec, "fastv", 7)
    prefill = made.prefill(prompt)
    dropped = set(np.flatnonzero(prompt.input_ids == PLACEHOLDER)) - set(np.concatenate(prefill.stages[0].kept))
    assert len(dropped) == sum(prompt.counts) - 7 * len(prompt.counts)
    new = list(made.stream(prompt, replace(GREEDY, max_new_tokens=6)))
    assert len(new) == 6

    def masked(ids: list[int]) -> np.ndarray:
        once = Plain(model, prompt, ids, {})
        with torch.no_grad():
            rows = torch.cat([once.embeds(), model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))])
            mask = causal(len(rows))
            hidden = mask.clone()
            hidden[..., sorted(dropped)] = float("-inf")
            hidden[..., range(len(rows)), range(len(rows))] = 0  # a dropped row may see itself: nobody reads it
            for layer in range(SIZES.layers):
                rows = once.run_layer(layer, rows, list(range(len(rows))), mask if layer < 2 else hidden)
            return once.head(rows[-1])

    np.testing.assert_allclose(prefill.logits, masked([]), rtol=1e-4, atol=1e-4)
    for index in range(6):
        assert new[index] == int(np.argmax(masked(new[:index])))


@pytest.mark.parametrize("method", INNER_METHODS)
def test_each_image_is_pruned_to_the_budget_on_its_own(method: str, checkpoint: Path, spec: DecoderSpec) -> None:
    prompt = PROMPTS["two images"]
    made = decoder_of(checkpoint, spec, method, 16)
    for stage in made.prefill(prompt).stages:
        keep = made.schedule(N).cut_at(stage.layer)
        assert keep is not None
        assert [len(kept) for kept in stage.kept] == [keep.left, keep.left]
        first, second = (set(kept.tolist()) - {-1} for kept in stage.kept)
        assert max(first) < 4 + N < min(second)
        assert 0 < len(first) <= keep.keep >= len(second) > 0  # of what was merged before, some may be kept again


def test_pruning_matters(checkpoint: Path, spec: DecoderSpec, plain_decoder: HfDecoder) -> None:
    """Otherwise the other tests would compare one thing with itself."""
    prompt = PROMPTS["two images"]
    answers = {tuple(decoder_of(checkpoint, spec, method, 14).stream(prompt, GREEDY)) for method in INNER_METHODS}
    assert len(answers | {tuple(plain_decoder.stream(prompt, GREEDY))}) == 4


def test_an_end_token_ends_and_a_stream_may_be_left(checkpoint: Path, spec: DecoderSpec) -> None:
    made, prompt = decoder_of(checkpoint, spec, "pyramiddrop", 15), PROMPTS["another"]
    whole = list(made.stream(prompt, GREEDY))
    stop = whole[3]
    ended = list(made.stream(prompt, replace(GREEDY, stop_token_ids=(stop,))))
    assert ended == whole[: whole.index(stop)]
    early = made.stream(prompt, GREEDY)
    assert next(early) == whole[0]
    early.close()  # type: ignore[attr-defined]
    assert list(made.stream(prompt, GREEDY)) == whole


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (2, 1), (9, 3), (30, 4), (83, 9)])
def test_clusters_are_those_of_plain_loops(count: int, clusters: int) -> None:
    rows = np.random.default_rng(count).standard_normal((count, 24)).astype(np.float32)
    found = cluster_means(torch.from_numpy(rows), clusters).numpy()
    np.testing.assert_allclose(found, clustered(rows, clusters), rtol=1e-5, atol=1e-6)


def test_clusters_of_equal_rows() -> None:
    rows = torch.ones(12, 8)
    np.testing.assert_allclose(cluster_means(rows, 2).numpy(), np.ones((2, 8)))


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("method", INNER_METHODS)
class TestRefusals:
    def test_a_budget_that_an_image_does_not_have(self, method: str, checkpoint: Path, spec: DecoderSpec) -> None:
        with pytest.raises(BudgetError, match="budget is 0"):
            inner_decoder(checkpoint, spec, method, 0)
        made = decoder_of(checkpoint, spec, method, 30)
        with pytest.raises(BudgetError, match=r"budget is 30, it must be in 1\.\.29"):
            made.stream(PROMPTS["two sizes"], GREEDY)

    def test_a_prompt_without_an_image(self, method: str, checkpoint: Path, spec: DecoderSpec) -> None:
        with pytest.raises(PromptError, match="has no image"):
            decoder_of(checkpoint, spec, method, 15).stream(prompt_of(), GREEDY)

    def test_a_prompt_that_ends_with_an_image(self, method: str, checkpoint: Path, spec: DecoderSpec) -> None:
        prompt = prompt_of(N)
        bare = replace(prompt, input_ids=prompt.input_ids[: 4 + N])
        with pytest.raises(PromptError, match="ends with an image"):
            decoder_of(checkpoint, spec, method, 15).stream(bare, GREEDY)

    def test_placeholders_torn_apart(self, method: str, checkpoint: Path, spec: DecoderSpec) -> None:
        prompt = prompt_of(N)
        torn = replace(prompt, input_ids=np.insert(prompt.input_ids, 9, 20))
        with pytest.raises(PromptError, match="side by side"):
            decoder_of(checkpoint, spec, method, 15).stream(torn, GREEDY)

    def test_rows_and_sampling_are_checked_as_elsewhere(self, method: str, checkpoint: Path, spec: DecoderSpec) -> None:
        made, prompt = decoder_of(checkpoint, spec, method, 15), prompt_of(N)
        with pytest.raises(PromptError, match="40 image places, 39 visual rows"):
            made.stream(replace(prompt, rows=prompt.rows[1:]), GREEDY)
        with pytest.raises(UsageError, match="top_p"):
            made.stream(prompt, replace(GREEDY, top_p=0))

    def test_a_closed_decoder(self, method: str, checkpoint: Path, spec: DecoderSpec) -> None:
        made = decoder_of(checkpoint, spec, method, 15)
        made.close()
        made.close()
        with pytest.raises(EnvironmentFaultError, match="closed"):
            made.stream(prompt_of(N), GREEDY)
        with pytest.raises(EnvironmentFaultError, match="closed"):
            made.prefill(prompt_of(N))

    def test_settings_of_another_method(self, method: str, checkpoint: Path, spec: DecoderSpec) -> None:
        with pytest.raises(UsageError, match=f"are not the settings of {method}"):
            inner_decoder(checkpoint, spec, method, 15, settings=RefetchSettings())


def test_unknown_methods(checkpoint: Path, spec: DecoderSpec) -> None:
    with pytest.raises(UnknownNameError, match="Known: fastv, sparsevlm, pyramiddrop"):
        inner_decoder(checkpoint, spec, "holov", 5)
    with pytest.raises(UnknownNameError, match="RefetchDecoder"):
        inner_decoder(checkpoint, spec, "refetch", 5)


def test_a_layer_past_the_last(checkpoint: Path, spec: DecoderSpec) -> None:
    made = decoder_of(checkpoint, spec, "fastv", 5, FastVSettings(layer=7))
    with pytest.raises(UsageError, match="layer is 7, the decoder has 7"):
        made.stream(prompt_of(N), GREEDY)


def test_a_language_model_that_is_no_llama(tmp_path: Path, spec: DecoderSpec) -> None:
    text = MistralConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(vision_config={"model_type": "clip_vision_model", **vision}, text_config=text)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "mistral")
    with pytest.raises(UnsupportedModelError, match="this is 'mistral'"):
        inner_decoder(tmp_path / "mistral", spec, "fastv", 5, provider="cpu")
