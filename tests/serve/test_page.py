"""What can be said of the page without a browser; `scripts/check_page` uses it in one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from holov_export.serve.app import PAGE

HTML, CSS = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "page.css"))
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.glob("*.js"))}
NODE = shutil.which("node")
LABELLED = ("input", "textarea")


class _Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture(scope="module")
def elements() -> _Elements:
    parser = _Elements()
    parser.feed(HTML)
    return parser


def ids(elements: _Elements) -> list[str]:
    return [value for _, attributes in elements.found if (value := attributes.get("id"))]


def test_the_files_are_there_and_no_others() -> None:
    assert {path.name for path in PAGE.iterdir()} == {"index.html", "page.css", "page.js", "server.js"}
    assert PAGE.parent.parent.name == "holov_export"  # all of this folder goes into the wheel
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 64 * 1024


def test_everything_it_loads_is_a_file_of_the_page(elements: _Elements) -> None:
    loaded = [attributes[name] for _, attributes in elements.found for name in ("src", "href") if name in attributes]
    for text in SCRIPTS.values():
        loaded += re.findall(r'\b(?:from|import)\s*\(?\s*"([^"]+)"', text)
    files = [item for item in loaded if item and not item.startswith("data:")]
    assert len(files) == 3
    assert all(item.startswith("/page/") and (PAGE / item.removeprefix("/page/")).is_file() for item in files)


@pytest.mark.parametrize("name", ["index.html", "page.css", *SCRIPTS])
def test_nothing_comes_from_another_host(name: str) -> None:
    text = (PAGE / name).read_text(encoding="utf-8")
    assert not re.findall(r"https?://|['\"(]//|@import|\burl\(", text)


def test_the_policy_has_nothing_inline_to_refuse(elements: _Elements) -> None:
    assert elements.inline == ""
    attributes = {name for _, given in elements.found for name in given}
    assert not {name for name in attributes if name.startswith("on")} and "style" not in attributes


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_text_is_never_read_as_html_or_as_a_script(name: str) -> None:
    dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"style"
    assert not re.findall(dangerous, SCRIPTS[name])


def test_the_key_is_kept_for_a_tab_only() -> None:
    assert "sessionStorage" in SCRIPTS["page.js"]
    assert not [name for name, text in SCRIPTS.items() if re.search(r"localStorage|document\.cookie|indexedDB", text)]


def test_names_that_the_script_uses_are_in_the_page(elements: _Elements) -> None:
    used = set(re.findall(r'\bat\("([a-z-]+)"\)', SCRIPTS["page.js"]))
    assert len(used) > 20 and used <= set(ids(elements))


def test_names_of_the_style_are_in_the_page(elements: _Elements) -> None:
    colours = r"#(?:[0-9a-f]{3}|[0-9a-f]{6})\b"
    used = set(re.findall(r"#([a-z][a-z-]*)", re.sub(colours, "", CSS)))
    assert used and used <= set(ids(elements))


def test_an_id_is_there_once(elements: _Elements) -> None:
    assert len(ids(elements)) == len(set(ids(elements)))


def test_references_lead_to_ids(elements: _Elements) -> None:
    for _, attributes in elements.found:
        for name in ("for", "aria-labelledby"):
            assert attributes.get(name) is None or attributes[name] in ids(elements)


def test_every_field_has_a_label(elements: _Elements) -> None:
    labelled = {attributes.get("for") for tag, attributes in elements.found if tag == "label"}
    wrapped = set(re.findall(r'<label[^>]*><input id="([a-z-]+)"', HTML))
    fields = {attributes["id"] for tag, attributes in elements.found if tag in LABELLED}
    assert fields <= labelled | wrapped


def test_what_changes_is_told_to_screen_readers(elements: _Elements) -> None:
    roles = {attributes.get("id"): attributes.get("role") for _, attributes in elements.found}
    assert roles["log"] == "log" and roles["problem"] == "alert" and roles["facts"] == "status"


def test_it_is_drawn_light_and_dark_and_on_phones() -> None:
    assert "prefers-color-scheme: dark" in CSS and "max-width: 820px" in CSS and 'name="viewport"' in HTML
    for name in ("queue", "preprocess", "vision", "stitch", "setup", "prefill", "decode"):
        assert CSS.count(f"--{name}:") == 2, name


@pytest.mark.parametrize("name", sorted(SCRIPTS))
@pytest.mark.skipif(NODE is None, reason="there is no node to read the script with")
def test_the_script_is_javascript(name: str, tmp_path: Path) -> None:
    module = tmp_path / f"{Path(name).stem}.mjs"
    module.write_text(SCRIPTS[name], encoding="utf-8")
    read = subprocess.run([str(NODE), "--check", str(module)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr


EVENTS = """
import { answerEvents, modelFromServer } from "./server.mjs";
const bytes = new TextEncoder().encode(process.argv[2]);
globalThis.fetch = async (path, { headers, body }) => {
  if (path === "/v1/models") return new Response('{"error": {"message": "no"}}', { status: 401 });
  console.log(JSON.stringify([headers.authorization, JSON.parse(body)]));
  const pieces = new ReadableStream({ start(out) {
    for (let at = 0; at < bytes.length; at += 3) out.enqueue(bytes.slice(at, at + 3));
    out.close();
  } });
  return new Response(pieces);
};
const turns = [{ question: "a", pictures: [{ url: "data:x" }], answer: "b" }, { question: "c", pictures: [] }];
try {
  for await (const chunk of answerEvents({ model: "m", turns, key: "k" })) console.log(chunk.text);
} catch (error) { console.log("problem:", error.message); }
for (const key of ["", "k"]) await modelFromServer(key).catch((error) => console.log(error.status, error.message));
"""


@pytest.fixture
def run_events(tmp_path: Path):
    if NODE is None:
        pytest.skip("there is no node to run the script with")

    def run(stream: str) -> list[str]:
        (tmp_path / "server.mjs").write_text(SCRIPTS["server.js"], encoding="utf-8")
        (tmp_path / "events.mjs").write_text(EVENTS, encoding="utf-8")
        command = [str(NODE), "events.mjs", stream]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


class TestEvents:
    def test_events_are_whole_however_the_bytes_are_cut(self, run_events) -> None:
        lines = run_events('data: {"text": "grüß"}\n\ndata: {"text": "dich"}\n\ndata: [DONE]\n\n')
        assert lines[1:3] == ["grüß", "dich"] and "problem" not in "".join(lines)

    def test_turns_become_messages_and_no_budget_is_sent_unasked(self, run_events) -> None:
        sent = run_events("data: [DONE]\n\n")[0]
        assert sent.startswith('["Bearer k",{"model":"m","messages":[{"role":"user","content":[{"type":"image_url"')
        assert '{"role":"assistant","content":"b"},{"role":"user","content":[{"type":"text","text":"c"}]}]' in sent
        assert '"stream":true,"kept":true' in sent and "budget" not in sent

    def test_an_error_in_the_stream_ends_it(self, run_events) -> None:
        lines = run_events('data: {"text": "a"}\n\ndata: {"error": {"message": "too late"}}\n\ndata: [DONE]\n\n')
        assert lines[1:3] == ["a", "problem: too late"]

    def test_a_stream_without_its_end_is_an_error(self, run_events) -> None:
        assert run_events('data: {"text": "a"}\n\n')[2] == "problem: The answer broke off."

    def test_a_missing_and_a_wrong_key_are_told_apart(self, run_events) -> None:
        told = run_events("data: [DONE]\n\n")[-2:]
        assert told == ["401 This server needs an API key.", "401 The server refuses this API key."]
