"""`holov-export models`: what is said of models whose pictures have unequal numbers of tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from holov_export.catalog import CATALOG
from holov_export.cli import run
from holov_export.cli.console import OUT

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture) -> str:
    assert run(["models"]) == 0
    return capsys.readouterr().out


def row_of(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
    return line.split()


@pytest.mark.parametrize(
    ("name", "tokens", "videos"),
    [
        ("demo", "144", "no"),
        ("llava-1.5-13b", "576", "no"),
        ("llava-v1.6-mistral-7b", "up to 2880", "no"),
        ("qwen2.5-vl-3b", "4-16384", "yes"),
        ("video-llava-7b", "256", "yes"),
    ],
)
def test_tokens_and_videos(name: str, tokens: str, videos: str, capsys: Capture) -> None:
    assert " ".join(row_of(shown(capsys), name)[1:]).startswith(f"{tokens} {videos} ")


def test_family_size_and_repository(capsys: Capture) -> None:
    lines = shown(capsys).splitlines()
    for entry in CATALOG.values():
        at = next(number for number, line in enumerate(lines) if line.split()[:1] == [entry.name])
        assert lines[at + 1].startswith(f"{entry.family}, {entry.parameters} ")
        assert lines[at + 1].strip().endswith(entry.repository or "in the package")


def test_a_model_that_is_not_pinned(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert "not pinned" not in shown(capsys)
    entry = replace(CATALOG["qwen2.5-vl-7b"], name="loose", revision="")
    monkeypatch.setitem(CATALOG, "loose", entry)
    assert shown(capsys).splitlines()[-1].strip().endswith(f"{entry.repository}, not pinned")


@pytest.mark.parametrize("width", [80, 120])
def test_narrow_terminals(width: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """No line is too long, and no repository is broken."""
    monkeypatch.setattr(OUT, "width", width)
    text = shown(capsys)
    assert max(map(len, text.splitlines())) <= width
    for entry in CATALOG.values():
        assert entry.repository in text


def test_json(capsys: Capture) -> None:
    assert run(["models", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(CATALOG)
    qwen, plain = listed["qwen2.5-vl-3b"], listed["llava-1.5-7b"]
    assert set(qwen) >= {"name", "repository", "revision", "parameters", "tokens", "note"}, "its form of before"
    assert (qwen["family"], qwen["tokens"], qwen["fewest"], qwen["varies"], qwen["videos"]) == (
        "qwen2_5_vl",
        16384,
        4,
        True,
        True,
    )
    assert (plain["family"], plain["tokens"], plain["fewest"], plain["varies"], plain["videos"]) == (
        "llava",
        576,
        None,
        False,
        False,
    )
