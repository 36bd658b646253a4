"""`evaluate` and `recommend` where pictures have unequal numbers of tokens: shares of each one's own, and numbers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from family_bundles import FamilyBundle, family_bundle
from PIL import Image

from holov_export.bundle import Bundle
from holov_export.cli import run
from holov_export.errors import BudgetError, PromptError, UsageError
from holov_export.evaluate.data import dataset_from_jsonl
from holov_export.evaluate.journal import JOURNAL, JournalEntry
from holov_export.evaluate.plan import plan_from_bundle
from holov_export.evaluate.report import JSON, MARKDOWN, evaluation_from_file
from holov_export.evaluate.run import AskSettings, check_prompts, header_of, most_newlines
from holov_export.runtime.session import Session
from holov_export.tensors import SamplingSettings

#: several exports with decoders; scripts/test-slow runs them
pytestmark = pytest.mark.slow

FAMILIES = ["llava_next", "qwen2_5_vl"]
#: wide, tall and square; no two have equally many tokens in both families
SIZES = [(180, 60), (90, 140), (120, 120)]
ASK = ["--threads", "1", "--provider", "cpu", "--max-new-tokens", "4", "--no-plot"]
SHARES = (Fraction(1, 3), Fraction(1, 9))


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyBundle:
    folder = tmp_path_factory.mktemp("bundles") / request.param
    return family_bundle(folder, request.param, decoder=True, also=("cls-topk",))


@pytest.fixture
def data(photographs: list[Image.Image], tmp_path: Path) -> Path:
    """Two questions about each of three pieces of photographs."""
    lines = []
    for number, (size, photograph) in enumerate(zip(SIZES, photographs, strict=False)):
        photograph.resize(size).save(tmp_path / f"{number}.png")
        for question in ("what is shown?", "how many are there?"):
            lines.append(json.dumps({"image": f"{number}.png", "question": question, "answers": ["one"]}))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def answered(out: Path) -> dict[tuple[str, int, str], JournalEntry]:
    """The entries of a journal by method, budget and question."""
    lines = (out / JOURNAL).read_text(encoding="utf-8").splitlines()[1:]
    entries = [JournalEntry.model_validate_json(line) for line in lines]
    return {(entry.method, entry.budget, entry.question): entry for entry in entries}


def evaluated(made: FamilyBundle, data: Path, out: Path, *more: str) -> int:
    return run(["evaluate", str(made.bundle.folder), str(data), *ASK, "-o", str(out), *more])


def test_every_answer_is_that_of_a_session(made: FamilyBundle, data: Path, tmp_path: Path) -> None:
    """Both kinds of budgets in one table; each picture keeps a share of its own, or a number of tokens."""
    out = tmp_path / "out"
    assert evaluated(made, data, out, "--budgets", "1/3,30,1/9") == 0
    found, plan = answered(out), made.bundle.manifest.plan
    nominal = {share: round(plan.model.image_tokens * share) for share in SHARES}
    cells = {(method, budget) for method, budget, _ in found}
    assert cells == {("holov", plan.model.image_tokens)} | {
        key
        for method in ("holov", "cls-topk")
        for key in ((method, 30), *((f"{method}, {share} of each", nominal[share]) for share in SHARES))
    }
    tokens, sampling = {}, SamplingSettings(max_new_tokens=4)
    for method in ("holov", "cls-topk"):
        with Session.open(made.bundle, method=method, provider="cpu", threads=1) as session:
            for question in dataset_from_jsonl(data).questions:
                path = question.picture.path
                assert path is not None
                (whole,), _ = session.rows_of([path], budget=plan.model.image_tokens)
                assert whole.layout is not None
                own = tokens[question.picture.name] = whole.layout.tokens
                for name, nominally, budget in (
                    ("holov", plan.model.image_tokens, plan.model.image_tokens),
                    (method, 30, 30),
                    *((f"{method}, {share} of each", nominal[share], round(own * share)) for share in SHARES),
                ):
                    if name == "holov" and method != "holov":
                        continue
                    answer = session.ask(path, question.text, budget=budget, sampling=sampling)
                    entry = found[name, nominally, question.id]
                    assert entry.text == answer.text
                    assert entry.visual_tokens == answer.visual_tokens[0]
                    newlines = entry.visual_tokens - min(budget, own)
                    assert newlines > 0 if made.bundle.newline else newlines == 0
    assert len(set(tokens.values())) > 1
    assert min(tokens.values()) < plan.model.image_tokens


def test_the_report_says_which_budgets_are_shares(
    made: FamilyBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluated(made, data, out, "--methods", "holov") == 0
    said = capsys.readouterr()
    report, tokens = evaluation_from_file(out / JSON), made.bundle.manifest.plan.model.image_tokens
    assert [cell.own_share for cell in report.cells] == ["1/3", "2/9", "1/9"]
    assert [cell.share for cell in report.cells] == [0.333333, 0.222222, 0.111111]
    assert report.sizes == (Fraction(1, 3), Fraction(2, 9), Fraction(1, 9))
    assert (report.reference.budget, report.reference.own_share) == (tokens, None)
    assert report.ask.decoder == ("ort" if made.bundle.manifest.plan.model.family == "qwen2_5_vl" else "genai")
    assert report.bundle.decoder == "fp32"
    heads = said.out.splitlines()[1].split("  ")
    assert [head.strip() for head in heads if head.strip()] == [
        f"{tokens} (100.0%)",
        *(f"{share} of each" for share in ("1/3", "2/9", "1/9")),
    ]
    assert f"at most {tokens}" in said.err
    assert f"holov at {tokens}, 1/3 of each, 2/9 of each, 1/9 of each tokens" in said.err
    assert "1/3 of each" in (out / MARKDOWN).read_text(encoding="utf-8")


def test_recommend_goes_on_with_the_same_shares(
    made: FamilyBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluated(made, data, out, "--budgets", "1/9,20", "--methods", "holov") == 0
    before = (out / JOURNAL).read_bytes()
    line = ["recommend", str(made.bundle.folder), str(data), *ASK[:-1], "-o", str(out), "--rounds", "1"]
    capsys.readouterr()
    code = run([*line, "--metric", "loyalty", "--retain", "0.0001", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (out / JOURNAL).read_bytes() == before, "nothing is asked again"
    assert {item["own_share"] for item in found["candidates"]} == {"1/9", None}
    assert all(item["latency"]["first_token"] > 0 for item in found["candidates"])
    assert code == (0 if found["chosen"] else 1)


def test_a_second_run_with_a_number_does_not_take_the_answers_of_a_share(
    made: FamilyBundle, data: Path, tmp_path: Path
) -> None:
    out, nominal = tmp_path / "out", round(made.bundle.manifest.plan.model.image_tokens / 9)
    assert evaluated(made, data, out, "--budgets", "1/9", "--methods", "holov") == 0
    first = answered(out)
    assert evaluated(made, data, out, "--budgets", str(nominal), "--methods", "holov") == 0
    assert {key for key in answered(out) if key not in first} == {("holov", nominal, str(id_)) for id_ in range(1, 7)}


class TestPlans:
    def test_shares_of_square_pictures_are_numbers(self, toy_bundle: Bundle) -> None:
        shares = plan_from_bundle(toy_bundle, (), (Fraction(1, 9), Fraction(1, 3)))
        assert shares.cells == plan_from_bundle(toy_bundle, (), (21, 7)).cells
        assert plan_from_bundle(toy_bundle, (), (Fraction(1, 1),)).budgets == (64,)

    def test_a_share_is_of_each_pictures_own_tokens(self, made: FamilyBundle) -> None:
        (cell,) = plan_from_bundle(made.bundle, ("holov",), (Fraction(1, 9),)).cells
        assert [cell.kept_of(tokens) for tokens in (1, 9, 40, 80)] == [1, 1, 4, 9]
        (number,) = plan_from_bundle(made.bundle, ("holov",), (30,)).cells
        assert [number.kept_of(tokens) for tokens in (1, 80)] == [30, 30]

    def test_all_of_each_is_the_unpruned_run(self, made: FamilyBundle) -> None:
        plan = plan_from_bundle(made.bundle, ("cls-topk",), (Fraction(1, 1),))
        assert [cell.asked for cell in plan.cells] == [plan.reference.asked]

    def test_budgets_that_cannot_be(self, made: FamilyBundle) -> None:
        tokens = made.bundle.manifest.plan.model.image_tokens
        with pytest.raises(BudgetError, match=r"the share 10/9 is outside 0\.\.1"):
            plan_from_bundle(made.bundle, (), (Fraction(10, 9),))
        with pytest.raises(BudgetError, match="two budgets are"):
            plan_from_bundle(made.bundle, (), (Fraction(1, 9), round(tokens / 9)))
        with pytest.raises(BudgetError, match=rf"1\.\.{tokens}"):
            plan_from_bundle(made.bundle, (), (tokens + 1,))

    def test_rules_inside_the_language_model_are_for_equal_pictures(self, made: FamilyBundle) -> None:
        with pytest.raises(UsageError, match="only where all pictures have as many tokens"):
            plan_from_bundle(made.bundle, ("fastv",), (20,), decoder="hf")


class TestRefusals:
    @pytest.mark.parametrize("text", ["1/0", "1/x", "a"])
    def test_words_that_are_no_budgets(
        self, made: FamilyBundle, data: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert evaluated(made, data, tmp_path / "out", "--budgets", text) == 2
        assert "no list of whole numbers such as 192,64 or shares" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["-1/9", "0/9"])
    def test_shares_below_zero(
        self, made: FamilyBundle, data: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert evaluated(made, data, tmp_path / "out", f"--budgets={text}") == 2
        assert "is below 0" in capsys.readouterr().err

    def test_a_decoder_that_would_be_wrong(
        self, made: FamilyBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = evaluated(made, data, tmp_path / "out", "--decoder", "genai", "--limit", "1", "--budgets", "9")
        if made.bundle.manifest.plan.model.family == "qwen2_5_vl":
            assert code == 2
            assert "M-RoPE" in capsys.readouterr().err
            assert not (tmp_path / "out" / JOURNAL).exists()
        else:
            assert code == 0

    def test_the_decoder_that_suits_is_that_of_the_journal(self, made: FamilyBundle, data: Path) -> None:
        dataset = dataset_from_jsonl(data)
        suits = "ort" if made.bundle.manifest.plan.model.family == "qwen2_5_vl" else "genai"
        assert header_of(made.bundle, dataset, AskSettings()) == header_of(made.bundle, dataset, AskSettings(suits))

    def test_newlines_need_room_too(self, made: FamilyBundle, data: Path) -> None:
        plan = made.bundle.manifest.plan
        rows = most_newlines(plan)
        assert rows == (12 if plan.model.family == "llava_next" else 0)  # three tiles of four rows above each other
        path = data.with_name("long.jsonl")
        line = {"image": "0.png", "question": "7 " * plan.model.decoder.context, "answers": ["x"]}
        path.write_text(json.dumps(line) + "\n", encoding="utf-8")
        with pytest.raises(PromptError, match=f"beside the {plan.model.image_tokens + rows} of the largest picture"):
            check_prompts(made.bundle, dataset_from_jsonl(path), AskSettings())
