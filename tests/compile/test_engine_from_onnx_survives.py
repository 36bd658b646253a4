"""An engine folder is whole or not there: kill -9, a full disk, a second compiler, and an old engine meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorrt_standin
from engine_bundles import bundle_around
from tensorrt_standin import FakeGpu

from holov_export.bundle import Bundle
from holov_export.compile import engine_from_onnx
from holov_export.compile.compilation import CompileOptions
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.engine import Engine, check_plan, engines_in
from holov_export.errors import StorageError
from holov_export.spec import ModelSpec, Precision
from holov_export.targets import target_from_name

ExportedGraph = Callable[[str, Precision], Path]
TARGET = target_from_name("h200")
#: where the killed process is when the signal comes
MOMENTS = ("building", "half written", "recorded", "renaming")

_KILLED = """
import os, signal, sys
import tensorrt_standin
from tensorrt_standin import FakeGpu, builder
from holov_export import storage
from holov_export.bundle import open_bundle
from holov_export.compile import engine_from_onnx
from holov_export.compile.compilation import CompileOptions
from holov_export.targets import target_from_name

def die(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGKILL)

def half(work, *arguments, **settings):
    (work / "vision.engine").write_bytes(b"ftrt half an engine")
    die()

moment, folder = sys.argv[1:]
if moment == "building":
    builder._build = die
elif moment == "half written":
    engine_from_onnx._build = lambda job, destination: half(destination.parent)
elif moment == "recorded":
    write = engine_from_onnx.write_record
    engine_from_onnx.write_record = lambda *arguments: (write(*arguments), die())
else:
    storage._replace = die
with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
    engine_from_onnx.engine_from_bundle(
        open_bundle(folder), target_from_name("h200"), CompileOptions(layer_report=False, use_timing_cache=False)
    )
print("it was not killed")
"""


_INTERRUPTED = """
import sys, time
import tensorrt_standin
from tensorrt_standin import FakeGpu, builder
from holov_export.bundle import open_bundle
from holov_export.compile.compilation import CompileOptions
from holov_export.compile.engine_from_onnx import engine_from_bundle
from holov_export.targets import target_from_name

version, folder = sys.argv[1:]

def build(world, network, config):
    print("building", flush=True)
    monitor = config.progress_monitor if version != "8.6.0" else None
    for _ in range(1200):
        time.sleep(0.05)
        if monitor is not None and not monitor.step_complete("Tactic Selection", 0):
            raise builder.BuildError("cancelled")

builder._build = build
with tensorrt_standin.installed(version, gpu=FakeGpu()):
    try:
        engine_from_bundle(open_bundle(folder), target_from_name("h200"), CompileOptions(use_timing_cache=False))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
"""


@pytest.fixture
def bundle(exported_graph: ExportedGraph, llava_spec: ModelSpec, tmp_path: Path) -> Bundle:
    return bundle_around(exported_graph("holov", Precision.FP32), tmp_path / "bundle", llava_spec, Precision.FP32)


def compiled(bundle: Bundle, **settings: object) -> Engine:
    options = CompileOptions(layer_report=False, use_timing_cache=False, **settings)  # type: ignore[arg-type]
    with tensorrt_standin.installed("10.3.0", gpu=FakeGpu()):
        return engine_from_bundle(bundle, TARGET, options)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def kill_while(moment: str, bundle: Bundle) -> None:
    """Compile in another process that ends by SIGKILL at `moment`."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, moment, str(bundle.folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_leaves_no_half_engine(moment: str, bundle: Bundle) -> None:
    """Takes a second each: a process of its own loads ONNX."""
    kill_while(moment, bundle)
    assert engines_in(bundle.folder / "engines") == []
    assert not (bundle.folder / "engines" / "h200").exists()
    engine = compiled(bundle)  # and nothing stands in the way of the next build
    check_plan(engine)
    assert sorted(path.name for path in engine.folder.parent.iterdir()) == ["h200"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["half written", "renaming"])
def test_a_killed_build_leaves_the_old_engine(moment: str, bundle: Bundle) -> None:
    old = compiled(bundle)
    kill_while(moment, bundle)
    (found,) = engines_in(bundle.folder / "engines")
    assert found.record == old.record
    check_plan(found)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_ctrl_c_ends_a_build_at_once_and_leaves_nothing(version: str, bundle: Bundle) -> None:
    """Takes a second each: a process of its own loads ONNX. The build itself would take a minute."""
    command = [sys.executable, "-c", _INTERRUPTED, version, str(bundle.folder)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as done:
        assert done.stdout is not None
        assert done.stdout.readline() == "building\n"
        done.send_signal(signal.SIGINT)
        out, error = done.communicate(timeout=30)
    assert (done.returncode, out, error) == (130, "interrupted\n", "")
    assert not (bundle.folder / "engines").exists()


def test_a_new_engine_replaces_the_old_one(bundle: Bundle) -> None:
    old = compiled(bundle)
    new = compiled(bundle, batch="1:2:3")
    (found,) = engines_in(bundle.folder / "engines")
    assert found.record == new.record != old.record
    check_plan(found)
    assert [path.name for path in (bundle.folder / "engines").iterdir()] == ["h200"]


def test_a_full_disk_is_a_storage_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    old = compiled(bundle)

    def full(job: object, destination: Path) -> None:
        destination.write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine_from_onnx, "_build", full)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        compiled(bundle)
    assert caught.value.exit_code == 3
    (found,) = engines_in(bundle.folder / "engines")
    assert found.record == old.record
    assert [path.name for path in (bundle.folder / "engines").iterdir()] == ["h200"]


def test_too_little_room_is_said_before_the_build(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(bundle.folder)
    monkeypatch.setattr(engine_from_onnx.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(engine_from_onnx, "_build", None)
    with pytest.raises(StorageError, match="needs about"):
        compiled(bundle)
    assert engines_in(bundle.folder / "engines") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 KiB; only root can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(folder)], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(bundle: Bundle, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(bundle.folder)
    monkeypatch.setattr(engine_from_onnx.shutil, "disk_usage", lambda path: usage)  # the early look does not see it
    with pytest.raises(StorageError, match="the disk is full"):
        compiled(bundle, output=small_disk)
    assert list(small_disk.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_bundle_says_where_to_write_instead(bundle: Bundle) -> None:
    bundle.folder.chmod(0o555)
    try:
        with pytest.raises(StorageError, match="permission denied") as caught:
            compiled(bundle)
    finally:
        bundle.folder.chmod(0o755)
    assert "--output" in caught.value.hint


def test_two_compilers_do_not_write_the_same_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    inner: list[BaseException] = []

    def second(job: object, destination: Path) -> None:
        try:
            compiled(bundle)
        except StorageError as error:
            inner.append(error)
        destination.write_bytes(b"an engine")

    monkeypatch.setattr(engine_from_onnx, "_build", second)
    compiled(bundle)
    assert "another process" in str(inner[0])
