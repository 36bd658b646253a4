"""Refetch: pruned tokens as a memory of one FFN, against numpy."""

from __future__ import annotations

from dataclasses import replace
from math import erf, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from checkpoints import TinyLlava, write_checkpoint
from transformers import LlavaForConditionalGeneration

from holov_export.errors import EnvironmentFaultError, PromptError, UsageError
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.runtime.decoder_hf import HfDecoder
from holov_export.runtime.inner.methods import RefetchSettings
from holov_export.runtime.inner.refetch import RefetchDecoder, RefetchPrompt, refetch_prompt
from holov_export.spec import DecoderSpec
from holov_export.tensors import SamplingSettings, StitchedPrompt

PLACEHOLDER = 3
SIZES = TinyLlava(width=72, layers=4, heads=6, kv_heads=3, mlp=104, seed=1)
GREEDY = SamplingSettings(max_new_tokens=8)
ALWAYS = RefetchSettings(threshold=0, alpha=0.4)
KEPT = [np.array([1, 2, 7, 19, -1]), np.array([8, 0, 3])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("refetch") / "four-layers", SIZES)


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> DecoderSpec:
    return spec_from_checkpoint(checkpoint, "four-layers").decoder


@pytest.fixture(scope="module")
def plain(checkpoint: Path, spec: DecoderSpec) -> HfDecoder:
    return HfDecoder(checkpoint, spec, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()


def full_prompt() -> StitchedPrompt:
    """Images of 20 and 11 rows."""
    rows = (np.random.default_rng(0).standard_normal((31, SIZES.width)) * 0.4).astype(np.float32)
    ids = [1, 270, *[PLACEHOLDER] * 20, 13, *[PLACEHOLDER] * 11, 280, 281, 282, 283]
    return StitchedPrompt(np.array(ids, np.int64), rows, (20, 11), PLACEHOLDER, "look")


PROMPT = refetch_prompt(full_prompt(), KEPT)


def decoder_of(checkpoint: Path, spec: DecoderSpec, settings: RefetchSettings | None = None) -> RefetchDecoder:
    return RefetchDecoder(checkpoint, spec, settings, provider="cpu", threads=1)


def without_memory(prompt: RefetchPrompt) -> StitchedPrompt:
    return StitchedPrompt(prompt.input_ids, prompt.rows, prompt.counts, prompt.image_token_id, prompt.text)


class TestPrompt:
    def test_kept_rows_stay_in_raster_order_and_the_rest_is_carried(self) -> None:
        full = full_prompt()
        kept = [1, 2, 7, 19, 20, 23, 28]
        assert PROMPT.counts == (4, 3)
        np.testing.assert_array_equal(PROMPT.rows, full.rows[kept])
        np.testing.assert_array_equal(PROMPT.pruned, np.delete(full.rows, kept, axis=0))
        ids = [1, 270, *[PLACEHOLDER] * 4, 13, *[PLACEHOLDER] * 3, 280, 281, 282, 283]
        assert PROMPT.input_ids.tolist() == ids
        assert PROMPT.text == "look"

    def test_all_kept_and_none_kept(self) -> None:
        full = full_prompt()
        whole = refetch_prompt(full, [np.arange(20), np.arange(11)])
        np.testing.assert_array_equal(whole.input_ids, full.input_ids)
        assert len(whole.pruned) == 0
        assert refetch_prompt(full, [np.array([-1]), np.arange(11)]).counts == (0, 11)

    @pytest.mark.parametrize(
        ("kept", "said"),
        [
            ([np.array([0])], "1 images for a prompt with 2"),
            ([np.array([20]), np.array([0])], "distinct and below 20"),
            ([np.array([0]), np.array([4, 4])], "distinct and below 11"),
        ],
    )
    def test_positions_that_do_not_fit(self, kept: list[np.ndarray], said: str) -> None:
        with pytest.raises(PromptError, match=said):
            refetch_prompt(full_prompt(), kept)


class TestIdentity:
    """Where nothing is mixed in, every logit is that of the plain decoder's pruned prompt."""

    @pytest.mark.parametrize(
        "settings", [RefetchSettings(threshold=0, alpha=0), RefetchSettings(threshold=1, alpha=0.9)]
    )
    def test_alpha_0_and_a_threshold_that_is_never_passed(
        self, settings: RefetchSettings, checkpoint: Path, spec: DecoderSpec, plain: HfDecoder
    ) -> None:
        made = decoder_of(checkpoint, spec, settings)
        assert list(made.stream(PROMPT, GREEDY)) == list(plain.stream(without_memory(PROMPT), GREEDY))
        assert {step.triggered for step in made.steps} == {settings.threshold == 0}
        wanted = plain._prefilled(without_memory(PROMPT))[0]
        np.testing.assert_allclose(made.steps[0].logits, wanted, rtol=1e-5, atol=1e-5)

    def test_prompts_without_memory(self, checkpoint: Path, spec: DecoderSpec, plain: HfDecoder) -> None:
        made = decoder_of(checkpoint, spec, ALWAYS)
        full = full_prompt()
        for prompt in (full, without_memory(PROMPT), refetch_prompt(full, [np.arange(20), np.arange(11)])):
            assert list(made.stream(prompt, GREEDY)) == list(plain.stream(prompt, GREEDY))
            assert not any(step.triggered for step in made.steps)


class _Numpy:
    """One layer's FFN, the memory and the trigger by numpy, from what transformers' layers read and put out."""

    def __init__(self, model: LlavaForConditionalGeneration, settings: RefetchSettings, memory: np.ndarray) -> None:
        self.model, self.settings, self.memory = model, settings, memory.astype(np.float64)
        self.triggered = False

    def logits(self, prompt: StitchedPrompt) -> np.ndarray:
        """Hooks change the FFN of the layer at its last position; all else is transformers' own."""
        llama: Any = self.model.model.language_model
        at = llama.layers[2 if self.settings.layer is None else self.settings.layer]
        handles = [at.register_forward_pre_hook(self.judge), at.mlp.register_forward_hook(self.mix)]
        ids = torch.from_numpy(prompt.input_ids)
        try:
            with torch.no_grad():
                rows = self.model.get_input_embeddings()(ids).clone()
                rows[ids == PLACEHOLDER] = torch.from_numpy(prompt.rows)
                return llama_logits(self.model, rows)
        finally:
            for handle in handles:
                handle.remove()

    def judge(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        row = inputs[0][0, -1]
        scores = self.model.lm_head(self.model.model.language_model.norm(row)).double().numpy()
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        self.uncertainty = float(-(shares * np.log(shares)).sum() / log(len(shares)))
        self.triggered = self.uncertainty > self.settings.threshold

    def mix(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if not self.triggered:
            return output
        x, ffn = inputs[0][0, -1].double().numpy(), output[0, -1].double().numpy()
        delta = np.zeros_like(x)
        for z in self.memory:
            unit = z / np.sqrt((z * z).sum()) if self.settings.normalisation == "unit" else z
            delta += self.phi(float(x @ unit)) * unit
        if self.settings.matched:
            delta *= np.linalg.norm(ffn) / np.linalg.norm(delta)
        output[0, -1] = torch.from_numpy(self.settings.alpha * delta + (1 - self.settings.alpha) * ffn)
        return output

    def phi(self, product: float) -> float:
        if self.settings.phi == "relu":
            return max(product, 0.0)
        if self.settings.phi == "gelu":
            return product * 0.5 * (1 + erf(product / sqrt(2)))
        return product / (1 + np.exp(-product))  # LLaMA's silu


def llama_logits(model: LlavaForConditionalGeneration, rows: torch.Tensor) -> np.ndarray:
    out = model.model.language_model(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, -1]
    return np.asarray(model.lm_head(out))


@pytest.mark.parametrize(
    "settings",
    [
        ALWAYS,
        ALWAYS.model_copy(update={"layer": 0}),
        ALWAYS.model_copy(update={"layer": 3, "alpha": 1.0}),
        ALWAYS.model_copy(update={"phi": "relu", "normalisation": "none"}),
        ALWAYS.model_copy(update={"phi": "gelu", "matched": False}),
        ALWAYS.model_copy(update={"alpha": 0.05, "normalisation": "none", "matched": False}),
    ],
)
def test_the_formula(
    settings: RefetchSettings,
    checkpoint: Path,
    spec: DecoderSpec,
    plain: HfDecoder,
    model: LlavaForConditionalGeneration,
) -> None:
    made = decoder_of(checkpoint, spec, settings)
    tokens = list(made.stream(PROMPT, replace(GREEDY, max_new_tokens=1)))
    again = _Numpy(model, settings, PROMPT.pruned)
    wanted = again.logits(PROMPT)
    np.testing.assert_allclose(made.steps[0].logits, wanted, rtol=1e-3, atol=1e-3)
    assert made.steps[0].uncertainty == pytest.approx(again.uncertainty, abs=1e-5)
    assert made.steps[0].triggered
    assert tokens == [int(np.argmax(wanted))]
    unmixed = plain._prefilled(without_memory(PROMPT))[0]
    assert np.abs(wanted - unmixed).max() > 0.05, "the memory changed nothing"


def test_new_tokens_are_mixed_too(checkpoint: Path, spec: DecoderSpec, plain: HfDecoder) -> None:
    """Only the last position of each step is mixed, so a prefill of more text does not give the same."""
    made = decoder_of(checkpoint, spec, ALWAYS)
    tokens = list(made.stream(PROMPT, GREEDY))
    assert len(made.steps) == len(tokens) == 8
    assert all(step.triggered for step in made.steps)
    assert tokens != list(plain.stream(without_memory(PROMPT), GREEDY))
    assert [int(np.argmax(step.logits)) for step in made.steps] == tokens
    list(made.stream(PROMPT, replace(GREEDY, max_new_tokens=2)))
    assert len(made.steps) == 2


@pytest.fixture(scope="module")
def uncertainties(checkpoint: Path, spec: DecoderSpec) -> list[float]:
    made = decoder_of(checkpoint, spec, RefetchSettings(threshold=1))
    list(made.stream(PROMPT, GREEDY))
    return [step.uncertainty for step in made.steps]


def test_the_trigger_is_a_threshold(
    uncertainties: list[float], checkpoint: Path, spec: DecoderSpec, model: LlavaForConditionalGeneration
) -> None:
    """Just below the uncertainty of the first step it triggers, just above it does not."""
    assert all(0 < value < 1 for value in uncertainties)
    first = uncertainties[0]
    logits = []
    for shift, triggered in ((-1e-4, True), (1e-4, False)):
        settings = RefetchSettings(threshold=first + shift, alpha=0.4)
        made = decoder_of(checkpoint, spec, settings)
        list(made.stream(PROMPT, replace(GREEDY, max_new_tokens=1)))
        assert made.steps[0].triggered is triggered
        logits.append(made.steps[0].logits)
        np.testing.assert_allclose(logits[-1], _Numpy(model, settings, PROMPT.pruned).logits(PROMPT), atol=1e-3)
    assert np.abs(logits[0] - logits[1]).max() > 0.05


def test_the_default_layer_is_the_middle_one(checkpoint: Path, spec: DecoderSpec) -> None:
    logits = []
    for layer in (None, 2, 1):
        made = decoder_of(checkpoint, spec, ALWAYS.model_copy(update={"layer": layer}))
        list(made.stream(PROMPT, replace(GREEDY, max_new_tokens=1)))
        logits.append(made.steps[0].logits)
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0.01


def test_refusals(checkpoint: Path, spec: DecoderSpec) -> None:
    with pytest.raises(UsageError, match=r"refetch layer is 4, the decoder has 4"):
        decoder_of(checkpoint, spec, RefetchSettings(layer=4))
    for wrong in ({"alpha": 1.1}, {"threshold": -0.1}, {"phi": "tanh"}, {"beta": 1}):
        with pytest.raises(pydantic.ValidationError):
            RefetchSettings.model_validate(wrong)
    made = decoder_of(checkpoint, spec)
    with pytest.raises(PromptError, match="pruned rows are 71 wide, the decoder takes 72"):
        made.stream(replace(PROMPT, pruned=PROMPT.pruned[:, :71]), GREEDY)
    with pytest.raises(PromptError, match="7 image places, 6 visual rows"):
        made.stream(replace(PROMPT, rows=PROMPT.rows[1:]), GREEDY)
    made.close()
    with pytest.raises(EnvironmentFaultError, match="closed"):
        made.stream(PROMPT, GREEDY)
