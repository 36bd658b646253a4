"""scripts/fetch_calibration against a server on this machine: whole, interrupted, and what goes wrong on the way."""

from __future__ import annotations

import io
import os
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from holov_export.recipe_pictures import LOCK
from holov_export.recipes import pictures_of, recipe_from_name

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fetch_calibration"
NAMES = [f"{index:012d}.jpg" for index in (9, 25, 30, 34)]


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


class Web:
    """Pictures by path, how often each was asked for, and how often the server fails before it answers."""

    def __init__(self) -> None:
        self.pictures = {f"/train/{name}": jpeg(index) for index, name in enumerate(NAMES)}
        self.asked: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.cut: set[str] = set()
        self.address = ""


@pytest.fixture
def web() -> Iterator[Web]:
    state = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked[self.path] += 1
            data = state.pictures.get(self.path)
            if state.failures[self.path] > 0:
                state.failures[self.path] -= 1
                self.send_error(503)
            elif data is None:
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if self.path in state.cut else data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}/train/"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def recipe(tmp_path: Path, web: Web) -> Path:
    """Three pictures for the ranges, one to judge by."""
    entries = [f'    {{ file = "{name}" }},' for name in NAMES]
    lines = ['name = "four"', 'title = "x"', 'source = "files"', 'licence = "CC0"', f'fetch = "{web.address}"']
    lines += ["calibrate = [", *entries[:3], "]", "judge = [", *entries[3:], "]"]
    path = tmp_path / "four.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(recipe: Path | str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    line = [str(SCRIPT), str(recipe), str(folder), *more]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60, env=environment)


def test_all_pictures_and_the_lock(recipe: Path, web: Web, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    done = run(recipe, folder)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [*NAMES, LOCK]
    assert "licence: CC0" in done.stderr
    found = pictures_of(recipe_from_name(str(recipe)), folder)
    assert [item.name for item in (*found.calibrate, *found.judge)] == NAMES
    assert found.calibrate[1].path.read_bytes() == web.pictures[f"/train/{NAMES[1]}"]
    assert run(recipe, folder).returncode == 0
    assert set(web.asked.values()) == {1}  # nothing is loaded a second time


def test_a_run_that_stopped_goes_on(recipe: Path, web: Web, tmp_path: Path) -> None:
    """One picture is there, one is half there under its own name, one under a name of an unfinished load."""
    whole, half, part, _ = NAMES
    (tmp_path / whole).write_bytes(web.pictures[f"/train/{whole}"])
    (tmp_path / half).write_bytes(web.pictures[f"/train/{half}"][:300])
    (tmp_path / f".{part}.part").write_bytes(b"half")
    assert run(recipe, tmp_path).returncode == 0
    assert web.asked == {f"/train/{name}": 1 for name in NAMES if name != whole}
    assert len(pictures_of(recipe_from_name(str(recipe)), tmp_path).calibrate) == 3
    assert not list(tmp_path.glob(".*.part"))


def test_faults_of_a_moment_are_tried_again(recipe: Path, web: Web, tmp_path: Path) -> None:
    web.failures[f"/train/{NAMES[2]}"] = 1
    assert run(recipe, tmp_path).returncode == 0
    assert web.asked[f"/train/{NAMES[2]}"] == 2


def test_what_cannot_be_loaded_is_named_and_the_rest_is_kept(recipe: Path, web: Web, tmp_path: Path) -> None:
    del web.pictures[f"/train/{NAMES[0]}"]
    web.pictures[f"/train/{NAMES[1]}"] = b"<html>log in first</html>"
    web.cut.add(f"/train/{NAMES[2]}")
    done = run(recipe, tmp_path)
    assert done.returncode == 3
    assert re.search(rf"{NAMES[0]} could not be loaded: .*404", done.stderr)
    assert f"{NAMES[1]} did not arrive as a picture" in done.stderr
    assert re.search(rf"{NAMES[2]} could not be loaded: IncompleteRead", done.stderr)
    assert "3 pictures are missing or differ" in done.stderr
    assert web.asked[f"/train/{NAMES[0]}"] == 1  # there is no point in asking again
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == NAMES[3:]
    assert not (tmp_path / LOCK).exists()


def test_a_picture_that_differs_from_the_lock_is_named_and_left_alone(recipe: Path, web: Web, tmp_path: Path) -> None:
    assert run(recipe, tmp_path).returncode == 0
    (tmp_path / NAMES[0]).write_bytes(jpeg(50))
    (tmp_path / NAMES[1]).unlink()
    web.pictures[f"/train/{NAMES[1]}"] = jpeg(51)  # replaced where it came from
    lock = (tmp_path / LOCK).read_text(encoding="utf-8")
    done = run(recipe, tmp_path)
    assert done.returncode == 1
    assert NAMES[0] in done.stderr and NAMES[1] in done.stderr and NAMES[2] not in done.stderr
    assert (tmp_path / NAMES[0]).read_bytes() == jpeg(50)
    assert (tmp_path / LOCK).read_text(encoding="utf-8") == lock


def test_a_mirror(recipe: Path, web: Web, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace(web.address, "http://127.0.0.1:9/"), encoding="utf-8")
    assert run(recipe, tmp_path, "--base-url", web.address.rstrip("/")).returncode == 0
    done = run(recipe, tmp_path, "--base-url", "file:///etc/")
    assert done.returncode == 2 and "no address of the web" in done.stderr


def test_the_same_folder_for_two_recipes(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    text = recipe.read_text(encoding="utf-8")
    other.write_text(text.replace(f'    {{ file = "{NAMES[0]}" }},\n', ""), encoding="utf-8")
    assert run(recipe, tmp_path).returncode == 0
    assert run(other, tmp_path).returncode == 0
    assert len(pictures_of(recipe_from_name(str(recipe)), tmp_path).calibrate) == 3


@pytest.mark.parametrize("name", ["smoke-8", "folder", "nonsense"])
def test_recipes_that_need_no_loading(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)
    assert done.returncode == 2
    assert ("unknown recipe" if name == "nonsense" else "names no address") in done.stderr


def test_without_a_network_it_does_not_try_everything(tmp_path: Path) -> None:
    done = run("coco-512", tmp_path, "--base-url", "http://127.0.0.1:9/")
    assert done.returncode == 3
    assert "8 pictures are missing or differ, and the rest was not tried" in done.stderr
    assert not list(tmp_path.iterdir())
