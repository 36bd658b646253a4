"""What a --model value means, and what is said when it cannot be had."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from holov_export import catalog
from holov_export.catalog import CATALOG, checkpoint_from_reference, reference_from_name
from holov_export.errors import EnvironmentFaultError, NetworkError, StorageError, UnknownNameError


def test_the_table() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.tokens > 0
        assert bool(entry.repository) == (name != "demo")
        if entry.repository:
            assert re.fullmatch(r"[0-9a-f]{40}", entry.revision), "a full commit, not a branch"


def test_name_of_the_table() -> None:
    reference = reference_from_name("llava-1.5-7b")
    entry = CATALOG["llava-1.5-7b"]
    assert (reference.kind, reference.repository, reference.revision) == ("hub", entry.repository, entry.revision)
    assert reference.folder is None


def test_a_model_that_is_not_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest revision is taken, and the source says which that was."""
    hub = pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    asked = []

    def snapshot(repository: str, *, revision: str | None, **settings: object) -> str:
        asked.append((repository, revision))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    entry = replace(CATALOG["llava-1.5-13b"], name="loose", revision="")
    monkeypatch.setitem(CATALOG, "loose", entry)
    reference = reference_from_name("loose")
    assert reference.revision is None
    source = checkpoint_from_reference(reference, weights=False).source
    assert asked == [(entry.repository, None)]
    assert (source.name, source.revision) == (entry.repository, commit)


def test_every_family_is_in_the_table() -> None:
    names = {"llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-mistral-7b", "llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-13b"}
    assert names | {"qwen2.5-vl-3b", "qwen2.5-vl-7b", "video-llava-7b", "demo"} == set(CATALOG)
    assert len({entry.revision for entry in CATALOG.values()}) == len(CATALOG)


def test_files_of_processors_are_fetched_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []
    monkeypatch.setattr(catalog, "_cached", lambda reference, weights: None)
    monkeypatch.setattr(catalog, "_hub_answers", lambda endpoint: True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda name, *, revision, allow_patterns: asked.extend(allow_patterns) or str(tmp_path),
    )
    checkpoint_from_reference(reference_from_name("qwen2.5-vl-3b"), weights=False)
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "vocab.json", "merges.txt"} <= set(asked)
    assert not any("safetensors" in pattern for pattern in asked)


def test_demo_ships_with_the_package() -> None:
    reference = reference_from_name("demo")
    assert reference.kind == "bundled"
    assert reference.folder is not None
    checkpoint = checkpoint_from_reference(reference)
    assert (checkpoint.source.kind, checkpoint.source.name) == ("bundled", "demo")
    assert (checkpoint.folder / "config.json").is_file()


def test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-llava").mkdir()
    monkeypatch.chdir(tmp_path)
    for value in ("my-llava", "./my-llava", "my-llava/", str(tmp_path / "my-llava")):
        reference = reference_from_name(value)
        assert (reference.label, reference.kind) == ("my-llava", "local")
        checkpoint = checkpoint_from_reference(reference)
        assert checkpoint.folder == tmp_path / "my-llava"
        assert checkpoint.source.name == "my-llava", "no local path goes into a manifest"


def test_a_name_of_the_table_wins_over_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llava-1.5-7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reference_from_name("llava-1.5-7b").kind == "hub"
    assert reference_from_name("./llava-1.5-7b").kind == "local"


@pytest.mark.parametrize(
    ("value", "repository", "revision"),
    [("someone/their-llava", "someone/their-llava", None), ("someone/their-llava@abc1", "someone/their-llava", "abc1")],
)
def test_repository(value: str, repository: str, revision: str | None) -> None:
    reference = reference_from_name(value)
    assert (reference.kind, reference.repository, reference.revision) == ("hub", repository, revision)
    assert reference.label == "their-llava"


@pytest.mark.parametrize("value", ["./missing", "/no/such/folder", "~/no-such-folder-here", "missing/", "a/b/c"])
def test_path_that_is_no_directory(value: str) -> None:
    with pytest.raises(UnknownNameError, match="is not a directory") as caught:
        reference_from_name(value)
    assert caught.value.exit_code == 2


def test_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("x", encoding="utf-8")
    with pytest.raises(UnknownNameError, match="is not a directory"):
        reference_from_name(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("value", ["llava-1.5-8b", "", "Demo"])
def test_unknown_name_lists_the_known_ones(value: str) -> None:
    with pytest.raises(UnknownNameError, match=r"demo, llava-1\.5-7b"):
        reference_from_name(value)


def test_resolving_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "require", lambda module: pytest.fail(f"{module} was asked for"))
    reference_from_name("llava-1.5-7b")


OFFLINE = """
import sys
from holov_export.catalog import checkpoint_from_reference, reference_from_name
from holov_export.errors import NetworkError
try:
    checkpoint_from_reference(reference_from_name("llava-1.5-7b"), weights=sys.argv[1] == "weights")
except NetworkError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize("what", ["weights", "configuration"])
def test_without_network_and_copy_it_names_the_option(tmp_path: Path, what: str) -> None:
    pytest.importorskip("huggingface_hub")
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, what],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("3 'llava-hf/llava-1.5-7b-hf' is not in the local cache")
    assert "--model DIR" in run.stdout


@pytest.mark.parametrize(
    "value", ["a b/c", "a/b c", "a--b/c", "a/b..c", "a/b.git", "-a/b", "a/b-", "a/", "a/@main", "a/é", "a/" + "b" * 97]
)
def test_malformed_repository_id(value: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        checkpoint_from_reference(reference_from_name(value))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "value", ["a/b", "a-b/c.d_e", "A1/llava-1.5-7b-hf", "a/b..c", "a--b/c", "a/b-", "a/b.git", "é/b"]
)
def test_ids_are_judged_as_the_hub_judges_them(value: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    try:
        hub.utils.validate_repo_id(value)
    except hub.errors.HFValidationError:
        with pytest.raises(UnknownNameError):
            reference_from_name(value)
    else:
        assert reference_from_name(value).repository == value


def test_a_name_that_only_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*arguments: object, **settings: object) -> NoReturn:
        raise hub.errors.HFValidationError("no such letters")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UnknownNameError, match="no such letters"):
        checkpoint_from_reference(reference_from_name("someone/their-llava"))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "full"), StorageError, os.strerror(errno.ENOSPC)),
        (OSError(errno.EDQUOT, "quota"), StorageError, os.strerror(errno.EDQUOT)),
        (OSError(errno.EROFS, "read-only", "/cache/blob"), StorageError, "/cache/blob"),
        (PermissionError(errno.EACCES, "denied", "/cache/blob"), StorageError, "/cache/blob"),
        (RuntimeError("Internal Writer Error: No space left on device (os error 28)"), StorageError, "No space left"),
        (RuntimeError("Reqwest Error: connection reset"), NetworkError, "cannot be reached"),
        (PermissionError(errno.EPERM, "a firewall's"), NetworkError, "cannot be reached"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), NetworkError, "cannot be reached"),
    ],
)
def test_a_disk_that_refuses_is_not_the_network(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], words: str
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*arguments: object, **settings: object) -> NoReturn:
        raise error

    monkeypatch.setattr(catalog, "_cached", lambda reference, weights: None)
    monkeypatch.setattr(catalog, "_hub_answers", lambda endpoint: True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(kind, match=words) as caught:
        checkpoint_from_reference(reference_from_name("someone/their-llava"))
    assert isinstance(caught.value, EnvironmentFaultError)
    assert ("HF_HOME" in str(caught.value)) == (kind is StorageError)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_in_the_cache_counts_as_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    index = tmp_path / "model.safetensors.index.json"
    monkeypatch.setattr(hub, "snapshot_download", lambda *arguments, **settings: str(tmp_path))
    reference = reference_from_name("someone/their-llava")
    index.write_text(text, encoding="utf-8")
    assert catalog._cached(reference, weights=True) is None
    index.write_text('{"weight_map": {"a": "shard"}}', encoding="utf-8")
    assert catalog._cached(reference, weights=True) is None
    (tmp_path / "shard").touch()
    assert catalog._cached(reference, weights=True) == tmp_path
