"""A bundle is written whole or not at all, and what is opened is what was written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from holov_export import storage
from holov_export.bundle import (
    MANIFEST,
    SCHEMA,
    Bundle,
    GraphTensor,
    Manifest,
    artifacts_in,
    atomic_folder,
    check_target,
    graph_file,
    open_bundle,
    provenance,
    read_manifest,
    write_manifest,
)
from holov_export.errors import BundleError, IntegrityError, StorageError, UnknownNameError
from holov_export.policies import HolovPolicy, ScopePolicy
from holov_export.spec import (
    CheckpointSource,
    Cut,
    DecoderPrecision,
    DecoderSpec,
    ExportPlan,
    GraphPlan,
    ImageSpec,
    ModelSpec,
    Precision,
    PromptSpec,
    VisionSpec,
)


def plan(decoder: DecoderPrecision | None = None) -> ExportPlan:
    return ExportPlan(
        model=ModelSpec(
            family="llava",
            name="tiny",
            image=ImageSpec(shortest_edge=28, crop=(28, 28), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            vision=VisionSpec(
                image_size=28,
                patch_size=7,
                width=32,
                layers=3,
                heads=2,
                mlp_width=48,
                activation="quick_gelu",
                layer_norm_eps=1e-5,
                feature_layer=1,
                projector_activation="gelu",
                projector_bias=True,
            ),
            decoder=DecoderSpec(
                architecture="llama",
                width=40,
                layers=2,
                heads=4,
                kv_heads=2,
                head_width=10,
                mlp_width=56,
                vocab_size=99,
                context=128,
                image_token_id=3,
                bos_token_id=1,
                eos_token_ids=(2,),
                pad_token_id=None,
            ),
            prompt=PromptSpec(chat_template="{{ messages }} naïve"),
        ),
        source=CheckpointSource(kind="local", name="tiny"),
        policy=HolovPolicy(crops=4),
        precision=Precision.FP16,
        decoder=decoder,
    )


def fill(folder: Path, content: str) -> None:
    """Make `folder` a bundle whose files all hold `content`."""
    (folder / "reports").mkdir()
    for name in ("vision.onnx", "vision.onnx.data", "tokenizer.json", "reports/parity.json"):
        (folder / name).write_text(content, encoding="utf-8")
    manifest = Manifest(
        schema_version=SCHEMA,
        plan=plan(),
        inputs=(GraphTensor(name="pixel_values", dtype="float16", shape=("batch", 3, 28, 28)),),
        outputs=(GraphTensor(name="counts", dtype="int64", shape=("batch",)),),
        artifacts=artifacts_in(folder),
        provenance=provenance("0.1.0", {"torch": "2.13.0"}),
    )
    write_manifest(folder, manifest)


def write_bundle(target: Path, content: str, *, overwrite: bool = False) -> None:
    with atomic_folder(target, overwrite=overwrite) as work:
        fill(work, content)


def content_of(target: Path) -> str:
    return open_bundle(target).vision.read_text(encoding="utf-8")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", "old")
    return tmp_path / "bundle"


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


class TestManifest:
    def test_round_trip(self, target: Path) -> None:
        manifest = read_manifest(target)
        assert manifest.plan == plan()
        assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest

    def test_artifacts_have_kinds(self, target: Path) -> None:
        kinds = {item.path: item.kind for item in read_manifest(target).artifacts}
        assert kinds == {
            "reports/parity.json": "report",
            "tokenizer.json": "tokenizer",
            "vision.onnx": "vision",
            "vision.onnx.data": "weights",
        }

    def test_decoder_folder_only_if_planned(self, target: Path) -> None:
        manifest = read_manifest(target)
        assert Bundle(target, manifest).decoder is None
        with_decoder = manifest.model_copy(update={"plan": plan(DecoderPrecision.INT4)})
        assert Bundle(target, with_decoder).decoder == target / "decoder"

    def test_no_local_path_is_recorded(self, target: Path) -> None:
        assert str(target.parent) not in (target / MANIFEST).read_text(encoding="utf-8")


class TestOpening:
    @pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
    def test_not_a_bundle(self, tmp_path: Path, make: Callable[[Path], object]) -> None:
        make(tmp_path / "other")
        with pytest.raises(BundleError, match=r"not a bundle"):
            open_bundle(tmp_path / "other")

    def test_newer_schema_says_upgrade(self, target: Path) -> None:
        raw = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        raw["schema_version"] = SCHEMA + 1
        raw["something_new"] = True
        (target / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
        with pytest.raises(BundleError, match="Upgrade") as caught:
            open_bundle(target)
        assert caught.value.exit_code == 2

    def test_older_schema_says_export_again(self, target: Path) -> None:
        raw = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        raw["schema_version"] = SCHEMA - 1
        (target / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
        with pytest.raises(BundleError, match="older") as caught:
            open_bundle(target)
        assert "Export it again" in caught.value.hint

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", f'{{"schema_version": {SCHEMA}}}', '{"schema_version": null}']
    )
    def test_manifest_that_does_not_parse(self, target: Path, text: str) -> None:
        (target / MANIFEST).write_text(text, encoding="utf-8")
        with pytest.raises(IntegrityError, match="does not parse"):
            open_bundle(target)

    def test_manifest_that_is_no_text(self, target: Path) -> None:
        (target / MANIFEST).write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(IntegrityError, match="not text"):
            open_bundle(target)

    def test_unknown_field_is_refused(self, target: Path) -> None:
        raw = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        raw["plan"]["precison"] = "fp16"
        (target / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
        with pytest.raises(IntegrityError, match="precison"):
            open_bundle(target)

    def test_changed_file(self, target: Path) -> None:
        (target / "vision.onnx.data").write_text("odl", encoding="utf-8")
        with pytest.raises(IntegrityError, match=r"vision\.onnx\.data differs from its sha256") as caught:
            open_bundle(target)
        assert caught.value.exit_code == 1
        open_bundle(target, verify="size")

    @pytest.mark.parametrize("verify", ["full", "size"])
    def test_truncated_file(self, target: Path, verify: str) -> None:
        (target / "vision.onnx").write_text("ol", encoding="utf-8")
        with pytest.raises(IntegrityError, match=r"vision\.onnx has 2 bytes, the manifest says 3"):
            open_bundle(target, verify=verify)  # type: ignore[arg-type]

    def test_missing_file(self, target: Path) -> None:
        (target / "tokenizer.json").unlink()
        with pytest.raises(IntegrityError, match=r"tokenizer\.json is missing"):
            open_bundle(target)

    @pytest.mark.parametrize("form", ["relative", "absolute", "link"])
    def test_file_outside_the_bundle(self, target: Path, form: str) -> None:
        secret = target.parent / "secret"
        secret.write_text("old", encoding="utf-8")
        path = {"relative": "../secret", "absolute": str(secret), "link": "link"}[form]
        (target / "link").symlink_to(secret)
        raw = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        raw["artifacts"][0]["path"] = path
        (target / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
        with pytest.raises(IntegrityError, match="outside the bundle"):
            open_bundle(target)


class TestWriting:
    def test_new_bundle_and_nothing_else(self, target: Path) -> None:
        assert content_of(target) == "old"
        assert siblings(target) == ["bundle"]
        assert target.stat().st_mode & 0o777 == 0o755

    def test_missing_parents_are_made(self, tmp_path: Path) -> None:
        write_bundle(tmp_path / "a" / "b" / "bundle", "new")
        assert content_of(tmp_path / "a" / "b" / "bundle") == "new"

    def test_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "bundle").mkdir()
        write_bundle(tmp_path / "bundle", "new")
        assert content_of(tmp_path / "bundle") == "new"

    def test_existing_bundle_is_kept(self, target: Path) -> None:
        with pytest.raises(BundleError, match="--overwrite"):
            write_bundle(target, "new")
        assert content_of(target) == "old"

    @pytest.mark.parametrize("exchange", [True, False])
    def test_overwrite(self, target: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not exchange:
            monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
        write_bundle(target, "new", overwrite=True)
        assert content_of(target) == "new"
        assert siblings(target) == ["bundle"]

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_what_is_no_bundle_is_never_replaced(self, tmp_path: Path, overwrite: bool) -> None:
        folder, file = tmp_path / "thesis", tmp_path / "file"
        folder.mkdir()
        (folder / "chapter.txt").write_text("years of work", encoding="utf-8")
        file.write_text("x", encoding="utf-8")
        for path in (folder, file):
            with pytest.raises(BundleError, match="not a bundle"):
                write_bundle(path, "new", overwrite=overwrite)
            with pytest.raises(BundleError, match="not a bundle"):
                check_target(path, overwrite=overwrite)
        assert (folder / "chapter.txt").read_text(encoding="utf-8") == "years of work"

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_failure_leaves_the_old_bundle(self, target: Path, error: type[BaseException]) -> None:
        def fail() -> None:
            with atomic_folder(target, overwrite=True) as work:
                fill(work, "new")
                raise error

        with pytest.raises(error):
            fail()
        assert content_of(target) == "old"
        assert siblings(target) == ["bundle"]

    def test_failure_leaves_nothing_where_nothing_was(self, tmp_path: Path) -> None:
        def fail() -> None:
            with atomic_folder(tmp_path / "bundle") as work:
                fill(work, "new")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert list(tmp_path.iterdir()) == []


class TestStorage:
    @pytest.mark.parametrize(
        ("number", "reason"),
        [
            (errno.EROFS, "read-only"),
            (errno.ENOSPC, "disk is full"),
            (errno.EDQUOT, "quota"),
            (errno.EACCES, "permission denied"),
            (errno.EBUSY, "mount point or in use"),
            (errno.EXDEV, "another file system"),
            (errno.EIO, "input/output error"),
        ],
    )
    @pytest.mark.parametrize("place", ["tempfile.mkdtemp", "os.fsync", "os.rename"])
    def test_refusals_of_the_system(
        self, target: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str, place: str
    ) -> None:
        def refuse(*arguments: object, **settings: object) -> NoReturn:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
        module, _, function = place.partition(".")
        monkeypatch.setattr(getattr(storage, module), function, refuse)
        with pytest.raises(StorageError, match=reason) as caught:
            write_bundle(target, "new", overwrite=True)
        monkeypatch.undo()
        assert caught.value.exit_code == 3
        assert content_of(target) == "old"
        assert siblings(target) == ["bundle"]

    def test_second_rename_fails(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without RENAME_EXCHANGE two renames are needed; when the second fails, the first is taken back."""
        rename = os.rename

        def refuse(source: Path, destination: Path) -> None:
            if ".partial-" in str(source):
                raise OSError(errno.ENOSPC, "full")
            rename(source, destination)

        monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
        monkeypatch.setattr(storage.os, "rename", refuse)
        with pytest.raises(StorageError, match="disk is full"):
            write_bundle(target, "new", overwrite=True)
        monkeypatch.undo()
        assert content_of(target) == "old"
        assert siblings(target) == ["bundle"]

    def test_disk_full_while_filling(self, target: Path) -> None:
        def fail() -> None:
            with atomic_folder(target, overwrite=True):
                raise OSError(errno.ENOSPC, "full")

        with pytest.raises(StorageError, match="disk is full"):
            fail()
        assert content_of(target) == "old"

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST])
    @pytest.mark.parametrize("name", ["checkpoint/config.json", ".other.partial-1/x", "bundle-2", "sub/.bundle.lock"])
    def test_a_file_that_is_only_read_is_not_blamed_on_the_target(self, target: Path, number: int, name: str) -> None:
        def fail() -> None:
            with atomic_folder(target, overwrite=True):
                raise OSError(number, os.strerror(number), str(target.parent / name))

        with pytest.raises(OSError, match=name) as caught:
            fail()
        assert not isinstance(caught.value, StorageError)
        assert content_of(target) == "old"

    @pytest.mark.parametrize(
        "name", ["{work}/vision.onnx", "{target}", "{target}/x", "{parent}", "{parent}/.bundle.lock", None]
    )
    def test_a_file_that_is_written_is(self, target: Path, name: str | None) -> None:
        def fail() -> None:
            with atomic_folder(target, overwrite=True) as work:
                named = None if name is None else name.format(work=work, target=target, parent=target.parent)
                raise PermissionError(errno.EACCES, "denied", named)

        with pytest.raises(StorageError, match=r"cannot write '.*/bundle': permission denied\. Nothing was changed"):
            fail()
        assert content_of(target) == "old"

    def test_a_full_disk_elsewhere_names_the_file(self, target: Path) -> None:
        def fail() -> None:
            with atomic_folder(target, overwrite=True):
                raise OSError(errno.ENOSPC, "full", "/elsewhere/scratch")

        with pytest.raises(StorageError, match="cannot write '/elsewhere/scratch': the disk is full"):
            fail()

    def test_nothing_was_changed_is_said_only_if_it_is_true(
        self, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flush = storage._fsync_path

        def refuse(path: Path) -> None:
            if path == target.parent:  # after the swap
                raise OSError(errno.EIO, "broken")
            flush(path)

        monkeypatch.setattr(storage, "_fsync_path", refuse)
        with pytest.raises(StorageError, match="input/output") as caught:
            write_bundle(target, "new", overwrite=True)
        assert "Nothing was changed" not in str(caught.value)
        assert str(target.parent) in caught.value.hint
        assert content_of(target) == "new"

    def test_parents_made_in_vain_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()

        def fail() -> None:
            with atomic_folder(tmp_path / "a" / "b" / "c" / "bundle"):
                raise OSError(errno.ENOSPC, "full")

        with pytest.raises(StorageError, match="Nothing was changed"):
            fail()
        assert list(tmp_path.rglob("*")) == [tmp_path / "a"]

    def test_a_mount_point_is_refused_at_once(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage.os.path, "ismount", lambda path: path == target)
        with pytest.raises(StorageError, match="mount point") as caught:
            check_target(target, overwrite=True)
        assert str(target / "bundle") in caught.value.hint
        (target.parent / "link").symlink_to(target)
        with pytest.raises(StorageError, match="mount point"):
            check_target(target.parent / "link", overwrite=True)

    @pytest.mark.skipif(not os.path.ismount("/proc"), reason="no mount point known here")
    def test_a_real_mount_point(self) -> None:
        with pytest.raises(StorageError, match="mount point"):
            check_target(Path("/proc"), overwrite=True)

    def test_parent_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x", encoding="utf-8")
        with pytest.raises(StorageError, match="cannot write"):
            write_bundle(tmp_path / "file" / "bundle", "new")

    def test_name_is_too_long(self, tmp_path: Path) -> None:
        for length in (250, 300):
            with pytest.raises(StorageError, match="name is too long"):
                write_bundle(tmp_path / ("n" * length), "new")


class TestLinks:
    @pytest.mark.parametrize("exchange", [True, False])
    def test_overwrite_through_a_link(self, target: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not exchange:
            monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
        links = target.parent / "links"
        links.mkdir()
        (links / "latest").symlink_to(target)
        with pytest.raises(BundleError, match="already holds a bundle"):
            write_bundle(links / "latest", "new")
        write_bundle(links / "latest", "new", overwrite=True)
        assert (links / "latest").is_symlink()
        assert not target.is_symlink()
        assert content_of(target) == "new"
        assert siblings(target) == ["bundle", "links"]
        assert siblings(links / "latest") == ["latest"]

    def test_dangling_link_is_filled_where_it_points(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("place")
        write_bundle(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
        assert content_of(tmp_path / "place") == "new"
        assert siblings(tmp_path / "place") == ["link", "place"]

    def test_link_to_a_disk_that_is_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "place")
        for refuse in (lambda path: check_target(path, overwrite=True), lambda path: write_bundle(path, "new")):
            with pytest.raises(StorageError, match="disk' is not a folder"):
                refuse(tmp_path / "link")
        assert siblings(tmp_path / "link") == ["link"]

    def test_link_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("link")
        with pytest.raises(StorageError, match="symbolic link to itself"):
            write_bundle(tmp_path / "link", "new")


class TestLeftovers:
    def test_stray_links_and_files_go_and_what_they_point_to_stays(self, target: Path) -> None:
        treasure = target.parent / "treasure"
        treasure.mkdir()
        (treasure / "file").write_text("x", encoding="utf-8")
        (target.parent / ".bundle.replaced-1").symlink_to(treasure)
        (target.parent / ".bundle.partial-2").symlink_to(target.parent / "nowhere")
        (target.parent / ".bundle.partial-3").write_text("x", encoding="utf-8")
        write_bundle(target, "new", overwrite=True)
        assert siblings(target) == ["bundle", "treasure"]
        assert (treasure / "file").is_file()

    @pytest.mark.parametrize("name", ["b[12]", "b*", "b?"])
    def test_a_name_is_no_pattern(self, tmp_path: Path, name: str) -> None:
        for other in ("b1", name):
            (tmp_path / f".{other}.partial-x").mkdir()
            (tmp_path / f".{other}.replaced-x").mkdir()
        write_bundle(tmp_path / name, "new")
        assert siblings(tmp_path / name) == sorted([".b1.partial-x", ".b1.replaced-x", name])

    def test_the_old_bundle_goes_back_into_an_empty_place(self, target: Path) -> None:
        os.rename(target, target.parent / ".bundle.replaced-x")
        with pytest.raises(BundleError, match="already holds a bundle"):
            write_bundle(target, "new")
        assert content_of(target) == "old"
        assert siblings(target) == ["bundle"]

    def test_what_lost_its_manifest_does_not_go_back(self, target: Path) -> None:
        os.rename(target, target.parent / ".bundle.replaced-x")
        (target.parent / ".bundle.replaced-x" / MANIFEST).unlink()
        write_bundle(target, "new")
        assert content_of(target) == "new"
        assert siblings(target) == ["bundle"]


class TestTwoExports:
    def test_second_is_refused_and_so_is_a_third(self, tmp_path: Path) -> None:
        target = tmp_path / "bundle"
        with atomic_folder(target) as work:
            for _ in range(2):  # the refused one must not take the lock of the first away
                with pytest.raises(StorageError, match="another process is writing"):
                    write_bundle(target, "intruder")
            assert work.is_dir()
            fill(work, "first")
        assert content_of(target) == "first"
        assert siblings(target) == ["bundle"]

    def test_one_that_ends_in_between_is_not_overwritten(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "bundle"
        take_lock = storage._take_lock

        def other_export_ends_first(lock: object, path: Path) -> None:
            target.mkdir()
            fill(target, "other")
            take_lock(lock, path)  # type: ignore[arg-type]

        monkeypatch.setattr(storage, "_take_lock", other_export_ends_first)
        with pytest.raises(BundleError, match="already holds a bundle"):
            write_bundle(target, "late")
        assert content_of(target) == "other"

    def test_lock_file_removed_by_the_one_that_held_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "bundle"
        take_lock = storage._take_lock

        def holder_ends_first(lock: object, path: Path) -> None:
            (tmp_path / ".bundle.lock").unlink()
            take_lock(lock, path)  # type: ignore[arg-type]

        monkeypatch.setattr(storage, "_take_lock", holder_ends_first)
        with pytest.raises(StorageError, match="another process"):
            write_bundle(target, "late")

    def test_other_targets_in_the_same_folder_are_free(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "one") as work:
            write_bundle(tmp_path / "two", "two")
            fill(work, "one")
        assert (content_of(tmp_path / "one"), content_of(tmp_path / "two")) == ("one", "two")


KILLED_EXPORT = """
import os, signal, sys
from pathlib import Path
import test_bundle
from holov_export import bundle, storage

target, point = Path(sys.argv[1]), sys.argv[2]

def die(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGKILL)

if point == "fsync":
    storage._fsync_folder = die
elif point == "before the swap":
    storage._replace = die
elif point == "after the swap":
    storage.shutil.rmtree = die
elif point == "between two renames":
    storage._exchange = lambda first, second: False
    rename, calls = os.rename, []
    def second_dies(*arguments):
        if calls:
            die()
        calls.append(rename(*arguments))
    os.rename = second_dies
with bundle.atomic_folder(target, overwrite=True) as work:
    if point == "start":
        die()
    test_bundle.fill(work, "new")
    if point == "filled":
        die()
raise SystemExit("was not killed")
"""


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("start", "old"),
        ("filled", "old"),
        ("fsync", "old"),
        ("before the swap", "old"),
        ("between two renames", None),
        ("after the swap", "new"),
    ],
)
def test_kill(tmp_path: Path, point: str, expected: str | None, exists: bool) -> None:
    target = tmp_path / "bundle"
    if exists:
        write_bundle(target, "old")
    elif point in ("between two renames", "after the swap"):
        pytest.skip("a single rename")
    run = subprocess.run(
        [sys.executable, "-c", KILLED_EXPORT, str(target), point],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    if not exists or expected is None:
        assert not target.exists()
    else:
        assert content_of(target) == expected
    if point == "between two renames":  # the next export finds the old bundle and puts it back
        with pytest.raises(BundleError, match="already holds a bundle"):
            write_bundle(target, "next")
        assert content_of(target) == "old"
    write_bundle(target, "next", overwrite=True)
    assert content_of(target) == "next"
    assert siblings(target) == ["bundle"], "leftovers of the killed export"


class TestGraphs:
    """A bundle with several vision graphs."""

    @pytest.fixture
    def several(self, target: Path) -> Bundle:
        manifest = read_manifest(target)
        also = (GraphPlan(policy=ScopePolicy()), GraphPlan(policy=HolovPolicy(), cuts=(Cut(layer=1),)))
        return Bundle(target, manifest.model_copy(update={"plan": plan().model_copy(update={"also": also})}))

    def test_one_graph(self, target: Path) -> None:
        bundle = open_bundle(target)
        assert bundle.methods == ("holov",)
        assert bundle.is_default
        assert bundle.of_method("holov").vision == bundle.vision

    def test_views(self, several: Bundle) -> None:
        assert several.methods == ("holov", "scope", "holov@1")
        scope = several.of_method("scope")
        assert (scope.vision.name, scope.method, scope.is_default) == ("vision-scope.onnx", "scope", False)
        assert scope.manifest.plan.policy == ScopePolicy()
        assert scope.methods == several.methods
        cut = several.of_method("holov@1")
        assert (cut.vision.name, cut.manifest.plan.cuts) == ("vision-holov-1.onnx", (Cut(layer=1),))
        assert several.of_method("holov").is_default

    @pytest.mark.parametrize("name", ["holov", "scope", "holov@1"])
    def test_a_view_of_a_view(self, several: Bundle, name: str) -> None:
        for first in several.methods:
            assert several.of_method(first).of_method(name) == several.of_method(name)

    def test_unknown(self, several: Bundle) -> None:
        with pytest.raises(UnknownNameError, match="no graph for 'divprune'; it has holov, scope, holov@1") as caught:
            several.of_method("divprune")
        assert "--method holov,scope,holov@1,divprune" in caught.value.hint

    def test_file_names(self) -> None:
        assert graph_file("holov@12:256,22") == "vision-holov-12-256-22.onnx"
        assert graph_file("scope", "parity", ".json") == "parity-scope.json"
