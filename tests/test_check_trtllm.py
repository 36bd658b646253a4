"""scripts/gpu/check_trtllm: all of it but TensorRT-LLM itself, which stand-ins take the place of."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import trtllm_standin
from trtllm_standin.trial import EngineTrial, HfLanguage, write_engine

from holov_export.bundle import Bundle
from holov_export.decoder_files import DecoderSizes
from holov_export.spec import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
SIZES = DecoderSizes(batch=4, images=1, budget=64, multimodal=256, input=200, sequence=300)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    torch.set_num_threads(1)
    folder = str(ROOT / "scripts" / "gpu")
    sys.path.insert(0, folder)
    try:
        import check_trtllm

        yield check_trtllm
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def bundle(toy_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(toy_bundle.folder, tmp_path_factory.mktemp("check") / "bundle"))


@pytest.fixture(scope="module")
def reference(
    script: ModuleType, bundle: Path, llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("check") / "deep" / "reference.npz"
    words = ["reference", bundle, "--checkpoint", llava_checkpoint, "--out", out, "--new", 6, "--pictures", 1]
    assert script.main([str(word) for word in words]) == 0
    return out


def asked(command: str, bundle: Path, reference: Path, out: Path, *more: object) -> list[str]:
    return [str(word) for word in (command, bundle, "--reference", reference, "--json", out, "--new", 6, *more)]


def test_the_reference_holds_each_budget_that_the_model_has(script: ModuleType, reference: Path) -> None:
    name, cases = script.read_cases(reference)
    assert name == "tiny-llava"
    assert [(case.budget, case.prompt.counts) for case in cases] == [(1, (1,)), (64, (64,)), (0, ())]
    assert all(len(case.tokens) == 6 for case in cases)
    assert all(int(np.sum(case.prompt.input_ids == 3)) == sum(case.prompt.counts) for case in cases)


def test_prompts_are_read_as_they_were_written(script: ModuleType, reference: Path, tmp_path: Path) -> None:
    _, cases = script.read_cases(reference)
    length = len(cases[0].prompt)
    positions = np.arange(3 * length).reshape(3, length)
    placed = replace(cases[0], prompt=replace(cases[0].prompt, position_ids=positions, next_position=9))
    script.write_cases([placed, cases[1]], tmp_path / "again.npz", "tiny")
    name, (first, second) = script.read_cases(tmp_path / "again.npz")
    assert name == "tiny" and first.prompt.next_position == 9 and second.prompt.position_ids is None
    assert np.array_equal(first.prompt.position_ids, positions) and first.prompt.text == cases[0].prompt.text
    assert np.array_equal(second.prompt.rows, cases[1].prompt.rows) and second.tokens == cases[1].tokens


def test_an_engine_that_answers_like_transformers_is_good(
    script: ModuleType, bundle: Path, reference: Path, llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path
) -> None:
    engine = write_engine(tmp_path / "engine", llava_spec.decoder, EngineTrial(), SIZES)
    language = HfLanguage(llava_checkpoint, llava_spec.decoder.vocab_size)
    with trtllm_standin.engines("0.16", language):
        assert script.main(asked("engine", bundle, reference, tmp_path / "out.json", "--engine", engine)) == 0
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["good"] is True and said["decoder"] == {"name": "tensorrt-llm 0.16.0 (engine, float32)", "lanes": 4}
    assert said["found"]["agree"] == {"alone": 1.0, "together": 1.0, "again": 1.0}
    assert said["found"]["lengths"] and said["found"]["closing"] and set(said["found"]["ttft"]) == {"0", "1", "64"}
    assert [line["same"]["together"] for line in said["found"]["cases"]] == [6, 6, 6]


def test_one_that_does_not_is_not(
    script: ModuleType, bundle: Path, reference: Path, llava_checkpoint: Path, llava_spec: ModelSpec, tmp_path: Path
) -> None:
    engine = write_engine(tmp_path / "engine", llava_spec.decoder, EngineTrial(), SIZES)
    right = HfLanguage(llava_checkpoint, llava_spec.decoder.vocab_size)

    def forgets_rows(item: Any) -> list[int]:
        rows = None if item.rows is None else torch.zeros_like(item.rows)
        return right(replace(item, rows=rows))

    with trtllm_standin.engines("0.16", forgets_rows):
        assert script.main(asked("engine", bundle, reference, tmp_path / "out.json", "--engine", engine)) == 1
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["good"] is False and said["found"]["agree"]["alone"] < 0.9
    assert said["found"]["cases"][-1]["same"]["alone"] == 6  # words alone are right


def test_the_api_is_checked_the_same_way(
    script: ModuleType,
    bundle: Path,
    reference: Path,
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    with trtllm_standin.llm_api("1.2"):
        words = asked("api", bundle, reference, tmp_path / "out.json", "--checkpoint", llava_checkpoint)
        assert script.main(words) == 0
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["decoder"]["name"] == "tensorrt-llm 1.2.1 (LLM API)" and said["found"]["first_tokens"]


def test_what_is_missing_is_noted_and_ends_with_3(
    script: ModuleType, bundle: Path, reference: Path, llava_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    assert script.main(asked("engine", bundle, reference, out, "--build", "--checkpoint", llava_checkpoint)) == 3
    steps = {step["step"]: step for step in json.loads(out.read_text())["steps"]}
    assert "convert_checkpoint.py was not found" in steps["build"]["reason"]
    assert steps["load"]["outcome"] == "failed" and "compare" not in steps
    assert script.main(asked("api", bundle, reference, out, "--checkpoint", llava_checkpoint)) == 3
    assert "'tensorrt_llm' is not installed" in json.loads(out.read_text())["steps"][0]["reason"]


def test_a_reference_of_another_model_is_refused(
    script: ModuleType, bundle: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, cases = script.read_cases(reference)
    script.write_cases(cases, tmp_path / "other.npz", "other")
    assert script.main(asked("engine", bundle, tmp_path / "other.npz", tmp_path / "out.json")) == 2
    assert "the reference is of 'other'" in capsys.readouterr().err
    (tmp_path / "text.npz").write_text("no")
    assert script.main(asked("engine", bundle, tmp_path / "text.npz", tmp_path / "out.json")) == 2


@pytest.mark.parametrize("words", [[], ["engine", "b"], ["api", "b", "--reference", "r", "--json", "j"], ["other"]])
def test_wrong_words_end_with_2(script: ModuleType, words: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(list(words))
    assert caught.value.code == 2


def test_tokens_are_compared_from_the_start(script: ModuleType) -> None:
    assert script.same_tokens([1, 2, 3], [1, 2, 3]) == 3
    assert script.same_tokens([1, 9, 3], [1, 2, 3]) == 1
    assert script.same_tokens([1, 2], [1, 2, 3]) == 2
    assert script.same_tokens([], [1]) == 0
