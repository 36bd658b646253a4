from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_cases import HEADER, fill

from holov_export.errors import IntegrityError, StorageError, UsageError
from holov_export.evaluate.journal import JOURNAL, JournalHeader, open_journal


def written(folder: Path, count: int = 3) -> bytes:
    with open_journal(folder, HEADER) as journal:
        fill(journal, "holov", 64, [f"answer {index}" for index in range(count)])
    return (folder / JOURNAL).read_bytes()


def found(folder: Path, header: JournalHeader = HEADER) -> dict[str, str]:
    with open_journal(folder, header) as journal:
        return {question: entry.text for question, entry in journal.cell("holov", 64).items()}


def test_answers_are_found_again(tmp_path: Path) -> None:
    content = written(tmp_path / "new" / "folder")
    assert content.count(b"\n") == 4
    assert found(tmp_path / "new" / "folder") == {"0": "answer 0", "1": "answer 1", "2": "answer 2"}
    assert (tmp_path / "new" / "folder" / JOURNAL).read_bytes() == content


def test_an_answer_is_in_the_file_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with open_journal(tmp_path, HEADER) as journal:
        fill(journal, "holov", 64, ["now"])
        assert b'"now"' in (tmp_path / JOURNAL).read_bytes()


def test_every_torn_end_is_cut_off(tmp_path: Path) -> None:
    """Whatever number of bytes a killed process left, all whole answers are kept and the next one follows them."""
    whole = written(tmp_path)
    starts = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in sorted({*range(0, len(whole), 7), *starts[:-1], *(start - 1 for start in starts)}):
        (tmp_path / JOURNAL).write_bytes(whole[:length])
        kept = sum(start <= length for start in starts[1:])
        assert len(found(tmp_path)) == kept, length
        with open_journal(tmp_path, HEADER) as journal:
            fill(journal, "holov", 64, {str(index): f"answer {index}" for index in range(kept, 3)})
        assert (tmp_path / JOURNAL).read_bytes() == whole, length


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_is_said_and_the_answers_so_far_stay(tmp_path: Path) -> None:
    import resource

    whole = written(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def asked() -> None:
        with open_journal(tmp_path, HEADER) as journal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
            fill(journal, "scope", 64, ["no room"])

    try:
        with pytest.raises(StorageError, match=r"cannot write '.*journal\.jsonl': File too large"):
            asked()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(found(tmp_path)) == 3
    assert (tmp_path / JOURNAL).read_bytes() == whole


def test_a_last_line_without_its_content_is_cut_off(tmp_path: Path) -> None:
    whole = written(tmp_path)
    (tmp_path / JOURNAL).write_bytes(whole + b"\0" * 50 + b"\n")
    assert len(found(tmp_path)) == 3
    assert (tmp_path / JOURNAL).read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    lines = written(tmp_path).splitlines(keepends=True)
    lines[2] = b'{"method": "holov"}\n'
    (tmp_path / JOURNAL).write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match=r"line 3 of .* does not parse"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data", "other", "the data differs"),
        ("manifest", "other", "the bundle differs"),
        ("suffix", "Answer shortly.", "--prompt-suffix differs"),
        ("max_new_tokens", 5, "--max-new-tokens differs"),
        ("decoder", "hf", "--decoder differs"),
        ("provider", "cuda", "--provider differs"),
        ("checkpoint", "c", "the checkpoint differs"),
    ],
)
def test_answers_to_something_else_are_refused(tmp_path: Path, field: str, value: object, words: str) -> None:
    before = written(tmp_path)
    other = HEADER.model_copy(update={field: value})
    with pytest.raises(UsageError, match=words):
        found(tmp_path, other)
    assert (tmp_path / JOURNAL).read_bytes() == before
    with open_journal(tmp_path, other, overwrite=True) as journal:
        assert not journal.cell("holov", 64)
    assert found(tmp_path, other) == {}


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b'{"a": 1}\n', b"\xff\xfe\n", b"\n"])
def test_another_file_of_that_name_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(UsageError, match="is no journal"):
        found(tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == content


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with open_journal(tmp_path, HEADER), pytest.raises(StorageError, match="another process is evaluating"):
        found(tmp_path)
    assert found(tmp_path) == {}


def test_another_process_is_refused_and_one_that_is_killed_lets_go(tmp_path: Path) -> None:
    holder = (
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from evaluation_cases import HEADER\n"
        "from holov_export.evaluate.journal import open_journal\n"
        "with open_journal(Path(sys.argv[1]), HEADER):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    line = [sys.executable, "-c", holder, str(tmp_path), *sys.path]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another process"):
            found(tmp_path)
        with pytest.raises(StorageError, match="another process"), open_journal(tmp_path, HEADER, overwrite=True):
            pass
        process.kill()
    assert found(tmp_path) == {}


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        found(tmp_path)
