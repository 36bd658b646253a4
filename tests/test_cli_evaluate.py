"""`holov-export evaluate` and `recommend`: what they print, write and refuse, and that a kill costs nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from evaluation_cases import with_graphs, write_picture, write_questions

from holov_export.bundle import Bundle
from holov_export.cli import run
from holov_export.cli.evaluate import command_line
from holov_export.evaluate.journal import JOURNAL
from holov_export.evaluate.report import JSON, MARKDOWN, PLOT, evaluation_from_file

QUICK = ["--budgets", "16,4", "--threads", "1", "--provider", "cpu", "--max-new-tokens", "4"]
CELLS = [("holov", 64), ("holov", 16), ("holov", 4), ("cls-topk", 16), ("cls-topk", 4)]


@pytest.fixture(scope="module")
def folder(answering_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(with_graphs(answering_bundle, tmp_path_factory.mktemp("evaluated") / "two", ["cls-topk"]).folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_questions(tmp_path / "data", pictures=3, each=2))


def tables(out: Path) -> tuple[dict[str, object], list[str]]:
    """The report and the Markdown without what is said of the run itself."""
    report = json.loads((out / JSON).read_text(encoding="utf-8"))
    for name in ("date", "seconds", "command"):
        del report[name]
    lines = (out / MARKDOWN).read_text(encoding="utf-8").splitlines()
    return report, lines[:2] + lines[3:]


def test_tables_on_stdout_the_rest_on_stderr_and_three_files(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["holov-export", "evaluate", folder, data, "-o", str(out)])
    assert run(["evaluate", folder, data, *QUICK, "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert "exact match, %" in said.out and "kept of exact match, %" in said.out
    assert said.out.splitlines()[-3:] == [str(out / name) for name in (JSON, MARKDOWN, PLOT)]
    assert "6 questions about 3 pictures in 5 cells: 30 answers" in said.err
    assert "holov at 64, 16, 4 tokens" in said.err and "bootstrap" in said.err
    assert sorted(path.name for path in out.iterdir()) == sorted([JOURNAL, JSON, MARKDOWN, PLOT])
    report = evaluation_from_file(out / JSON)
    assert report.command == "holov-export evaluate two data.jsonl -o out"
    for name in (JSON, MARKDOWN, JOURNAL):
        assert str(tmp_path) not in (out / name).read_text(encoding="utf-8")
    assert {item.kind for item in report.reference.kinds} == {"a", "b"}


def test_the_command_in_the_report_names_no_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["evaluate", "/a/b", "d.jsonl", "-o/x/out", "--images=/y/pics", "--metric=vqa", "--suffix", "one / two"]
    monkeypatch.setattr(sys, "argv", ["holov-export", *line])
    assert command_line() == ("holov-export evaluate b d.jsonl -oout --images=pics --metric=vqa --suffix 'one / two'")


def test_json_alone_is_on_stdout(folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["evaluate", folder, data, *QUICK, "-o", str(tmp_path / "out"), "--json", "--methods", "cls-topk"]
    assert run(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(cell["method"], cell["budget"]) for cell in report["cells"]] == [("cls-topk", 16), ("cls-topk", 4)]
    assert report["baseline"] == "cls-topk"


def test_the_folder_has_a_name_of_its_own_by_default(
    folder: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", folder, data, *QUICK, "--limit", "1"]) == 0
    assert (tmp_path / "two-data-evaluation" / JSON).is_file()


def test_no_plot_needs_no_matplotlib(
    folder: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert run(["evaluate", folder, data, *QUICK, "-o", str(out)]) == 3
    assert 'pip install "holov-export[bench]"' in capsys.readouterr().err
    assert not out.exists(), "matplotlib is asked for before anything is done"
    assert run(["evaluate", folder, data, *QUICK, "-o", str(out), "--no-plot", "--limit", "2"]) == 0
    assert not (out / PLOT).exists()


def test_methods_with_two_cuts_are_one_name(folder: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", folder, data, *QUICK, "--methods", "holov,scope@12:256,22,cls-topk"]) == 2
    assert "no method 'scope@12:256,22'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budgets", "65"], "1..64"),
        (["--budgets", "a"], "no list of whole numbers"),
        (["--budgets", "0"], "below 1"),
        (["--methods", "scope"], "no method 'scope'; it has: holov, cls-topk"),
        (["--methods", "holov,"], "no list of names"),
        (["--baseline", "scope"], "the baseline 'scope' is not among"),
        (["--metric", "bleu"], "unknown metric"),
        (["--metric", "f1"], "does not apply"),
        (["--checkpoint", "x"], "--checkpoint is for --decoder hf only"),
        (["--decoder", "hf"], "--checkpoint DIR"),
        (["--questions", "q.json"], "--questions is for vqav2 only"),
        (["--images", "nowhere"], "no folder of pictures"),
        (["--format", "mme"], "no folder of MME tasks"),
        (["--format", "textvqa"], "is no JSON"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_wrong_requests_are_usage_errors(
    folder: str, data: str, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["evaluate", folder, data, "-o", str(out), *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == ""
    assert not (out / JOURNAL).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{\n", "line 1: no JSON"),
        ('{"image": "picture_0.png", "question": "?"}\n', "line 1: no 'answers'"),
        ('{"image": "none.png", "question": "?", "answers": "x"}\n', "line 1: the image"),
        ("", "holds no question"),
    ],
)
def test_wrong_data_is_a_usage_error_with_its_line(
    folder: str, data: str, tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(data).write_text(content, encoding="utf-8")
    assert run(["evaluate", folder, data, *QUICK, "-o", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_other_refusals_and_their_exit_codes(
    folder: str, data: str, tmp_path: Path, toy_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    assert run(["evaluate", folder, data, *QUICK, "-o", str(tmp_path / "taken")]) == 3
    assert "is a file" in capsys.readouterr().err
    assert run(["evaluate", str(tmp_path), data, *QUICK]) == 2
    assert "is not a bundle" in capsys.readouterr().err
    assert run(["evaluate", folder, str(tmp_path / "none.jsonl"), *QUICK]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(["evaluate", str(toy_bundle.folder), data, *QUICK, "-o", str(tmp_path / "out")]) == 2
    assert "exported without a decoder" in capsys.readouterr().err


class TestTheJournal:
    def test_changed_data_is_refused_and_can_be_overwritten(
        self, folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["evaluate", folder, data, *QUICK, "--no-plot", "-o", str(tmp_path / "out")]
        assert run(line) == 0
        before = (tmp_path / "out" / JOURNAL).read_bytes()
        text = Path(data).read_text(encoding="utf-8")
        Path(data).write_text(text.replace("red", "green"), encoding="utf-8")
        assert run(line) == 2
        assert "holds answers to something else: the data differs" in capsys.readouterr().err
        assert (tmp_path / "out" / JOURNAL).read_bytes() == before
        assert run([*line, "--overwrite"]) == 0
        assert (tmp_path / "out" / JOURNAL).read_bytes() != before

    def test_a_changed_picture_or_setting_is_refused(
        self, folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["evaluate", folder, data, *QUICK, "--no-plot", "-o", str(tmp_path / "out")]
        assert run(line) == 0
        assert run([*line, "--suffix", "Answer the question using a single word or phrase."]) == 2
        assert "--prompt-suffix differs" in capsys.readouterr().err
        write_picture(Path(data).parent / "picture_2.png", seed=77)
        assert run(line) == 2
        assert "picture_2.png' is not the one" in capsys.readouterr().err

    def test_a_damaged_line_is_a_failed_check(
        self, folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["evaluate", folder, data, *QUICK, "--no-plot", "-o", str(tmp_path / "out")]
        assert run(line) == 0
        path = tmp_path / "out" / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:3], b"###\n", *lines[4:]]))
        assert run(line) == 1
        assert "line 4 of" in capsys.readouterr().err


class TestKilled:
    """A real process, SIGKILL, and the same command again."""

    @pytest.fixture
    def many(self, tmp_path: Path) -> str:
        return str(write_questions(tmp_path / "many", pictures=10, each=4))

    def start(self, folder: str, data: str, out: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "holov_export", "evaluate", folder, data, *QUICK, "--no-plot", "-o", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def test_a_run_that_is_killed_again_and_again_ends_with_the_same_table(
        self, folder: str, many: str, tmp_path: Path
    ) -> None:
        assert run(["evaluate", folder, many, *QUICK, "--no-plot", "-o", str(tmp_path / "whole")]) == 0
        dice, out, kept, kills = random.Random(4), tmp_path / "out", b"", 0
        for _ in range(4):
            journal = out / JOURNAL
            at = len(kept) + dice.randrange(1, 6000)
            with self.start(folder, many, out) as process:
                while process.poll() is None and not (journal.exists() and journal.stat().st_size >= at):
                    time.sleep(0.001)
                process.kill()
            kills += process.returncode == -signal.SIGKILL
            content = journal.read_bytes()
            assert content.startswith(kept), "what was answered once is never written again"
            kept = content[: content.rfind(b"\n") + 1]
            journal.write_bytes(kept + b'{"method": "holov", "bud')  # and a torn line, as a slower disk would leave it
        assert kills >= 2, "the process must have been killed while it asked"
        assert run(["evaluate", folder, many, *QUICK, "--no-plot", "-o", str(out)]) == 0
        assert tables(out) == tables(tmp_path / "whole")
        assert (out / JOURNAL).read_bytes() == (tmp_path / "whole" / JOURNAL).read_bytes()
        rows = [json.loads(line) for line in (out / JOURNAL).read_text(encoding="utf-8").splitlines()[1:]]
        asked = Counter((row["method"], row["budget"], row["question"]) for row in rows)
        assert set(asked.values()) == {1}
        assert set(asked) == {(*cell, str(number)) for cell in CELLS for number in range(1, 41)}

    def test_two_at_once(self, folder: str, many: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        with self.start(folder, many, out) as process:
            while process.poll() is None and not ((out / JOURNAL).exists() and (out / JOURNAL).stat().st_size > 500):
                time.sleep(0.001)
            process.send_signal(signal.SIGSTOP)  # it holds the lock while the other one tries
            try:
                assert run(["evaluate", folder, many, *QUICK, "--no-plot", "-o", str(out)]) == 3
                assert "another process is evaluating" in capsys.readouterr().err
            finally:
                process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=120) == 0
        assert len((out / JOURNAL).read_bytes().splitlines()) == 1 + 5 * 40


class TestRecommend:
    def test_it_asks_what_is_missing_and_uses_what_is_there(
        self, folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        settings = ["--threads", "1", "--provider", "cpu", "--max-new-tokens", "4", "-o", str(out)]
        assert run(["evaluate", folder, data, *QUICK, "--no-plot", "-o", str(out)]) == 0
        before = (out / JOURNAL).read_bytes()
        capsys.readouterr()
        line = ["recommend", folder, data, *settings, "--rounds", "2", "--metric", "loyalty", "--retain", "0.01"]
        code = run([*line, "--json"])
        said = capsys.readouterr()
        assert "30 answers; 30 are answered already" in said.err
        assert "holov, cls-topk at 16, 4 tokens" in said.err  # as the evaluation in the folder
        assert (out / JOURNAL).read_bytes() == before
        found = json.loads(said.out)
        assert (found["retain"], found["rounds"], found["metric"]) == (0.01, 2, "loyalty")
        assert len(found["candidates"]) == 4
        assert all(item["latency"]["first_token"] > 0 for item in (*found["candidates"], found["unpruned"]))
        assert code == (0 if found["chosen"] else 1)
        assert json.loads((out / "recommendation.json").read_text(encoding="utf-8")) == found

    def test_nothing_qualifies(
        self, folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """No answer of the random model is right, so nothing is kept of nothing."""
        line = ["recommend", folder, data, *QUICK, "--rounds", "1", "-o", str(tmp_path / "out")]
        assert run(line) == 1
        said = capsys.readouterr()
        assert "nothing keeps 98.0% of exact match" in said.err
        rows = [row.split() for row in said.out.splitlines()]
        assert [row[:2] for row in rows if row and row[0] in ("holov", "cls-topk", "unpruned")][-1] == [
            "unpruned",
            "64",
        ]

    @pytest.mark.parametrize("retain", ["0", "1.5", "x"])
    def test_shares_that_are_none(
        self, folder: str, data: str, retain: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["recommend", folder, data, "--retain", retain]) == 2
        assert "--retain" in capsys.readouterr().err
