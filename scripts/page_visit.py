"""A window with the page of a server of `holov-export serve`, and the server itself; for check_page.py."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "holov_export/data/demo-scenes"
KEY = "a key with spaces"
PATIENCE = 30.0
#: JavaScript that gives the page files as a drop or from the clipboard; takes [kind, [[name, type, base64], ...]]
GIVE_FILES = """([kind, files]) => {
  const data = new DataTransfer();
  for (const [name, type, text] of files)
    data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type }));
  const target = document.getElementById("stage"), common = { bubbles: true, cancelable: true };
  if (kind === "drop") {
    target.dispatchEvent(new DragEvent("dragover", { dataTransfer: data, ...common }));
    target.dispatchEvent(new DragEvent("drop", { dataTransfer: data, ...common }));
  } else target.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, ...common }));
}"""
#: remembers violations of the policy, and the length of the newest answer whenever it grows
WATCH = """
window.violations = [];
window.lengths = [];
addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  const texts = document.querySelectorAll(".answer .text");
  if (texts.length) window.lengths.push(texts[texts.length - 1].textContent.length);
}).observe(document.getElementById("log"), { childList: true, subtree: true, characterData: true }));
"""


class File(NamedTuple):
    """What is dropped or pasted."""

    name: str
    mime: str
    data: bytes


class Report:
    """Prints each check, and remembers whether all were good."""

    def __init__(self) -> None:
        self.good = True

    def row(self, what: str, good: bool, seen: object = "") -> None:
        self.good = self.good and good
        print(f"  {'ok   ' if good else 'WRONG'}  {what}{f': {seen}' if seen != '' or not good else ''}", flush=True)


def scene(number: int) -> File:
    name = f"scene_{number}.png"
    return File(name, "image/png", (SCENES / name).read_bytes())


def until(is_true: Callable[[], bool], seconds: float = PATIENCE) -> float | None:
    """How long it took; None where it never was."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if is_true():
            return time.monotonic() - began
        time.sleep(0.05)
    return None


class Server:
    """A server of its own; its end must be orderly."""

    def __init__(self, url: str) -> None:
        self.url = url

    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """An answer to a client without a browser."""
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as response:
            return json.load(response)

    def kept(self, file: File, question: str, **more: Any) -> dict[str, Any]:
        """What is kept of a picture, its answer included."""
        picture = {"url": f"data:{file.mime};base64,{base64.b64encode(file.data).decode()}"}
        content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": question}]
        model = self.json("/v1/models")["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "kept": True, **more}
        return self.json("/v1/chat/completions", body)["holov"]["kept"][0]

    def decodes(self, count: int) -> float | None:
        """Wait until so many answers are being made; returns the seconds, or None."""
        return until(lambda: self.json("/health")["decoding"] == count, 10)


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[Server]:
    program = str(ROOT / ".venv/bin/holov-export")
    command = [program, "serve", str(bundle), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("http"):
                    break
            else:
                raise SystemExit(f"{' '.join(command)} did not start:\n{''.join(said)}")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Server(said[-1].split()[0])
        finally:
            process.terminate()
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise SystemExit("the server did not end") from None
        if status != 0:
            raise SystemExit(f"the server ended with status {status}")


class Visit:
    """The page in a window, and what it did that it should not do.

    Attributes:
        complaints: of the console, errors of scripts, and requests to others; refusals by the server are no complaints.
        asked: bodies of the requests for answers.
    """

    def __init__(self, browser: Browser, url: str, *, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        self.url, self.complaints, self.asked = url, [], []
        size, scheme = {"width": width, "height": height}, "dark" if dark else "light"
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.add_init_script(WATCH)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._request)
        self.open()

    def open(self) -> None:
        self.page.goto(self.url)
        self.wait("!document.getElementById('facts').textContent.startsWith('Connecting')")

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and "the server responded with a status of 4" not in message.text:
            self.complaints.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):
            self.complaints.append(f"asks {request.url[:80]}")
        if request.method == "POST":
            self.asked.append(json.loads(request.post_data))

    def wait(self, condition: str) -> None:
        """Wait until an expression is true. Playwright's own waiting needs `eval`, which the page's policy forbids."""
        if until(lambda: bool(self.page.evaluate(condition))) is None:
            raise SystemExit(f"this did not come true: {condition}")

    def give(self, kind: str, *files: File) -> None:
        """Drop or paste files, and wait until they are there."""
        before = self.page.locator("#strip li").count()
        self.page.evaluate(GIVE_FILES, [kind, [(*file[:2], base64.b64encode(file.data).decode()) for file in files]])
        self.wait(f"document.querySelectorAll('#strip li').length === {before + len(files)}")

    def ask(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def done(self) -> str:
        """Wait for the end of the answer; returns its words."""
        self.page.wait_for_selector("#send", state="visible")
        return self.page.locator(".answer .text").last.inner_text().strip()

    def answer(self, question: str) -> str:
        self.ask(question)
        return self.done()

    def again(self, budget: int) -> str:
        """The last question with another budget."""
        self.choose(budget)
        self.page.click("text=Ask again")
        return self.done()

    def choose(self, budget: int) -> None:
        """Set the slider with the keyboard."""
        self.page.press("#budget", "Home")
        for _ in range(budget - 1):
            self.page.press("#budget", "ArrowRight")

    def text(self, name: str) -> str:
        return self.page.inner_text(f"#{name}")

    def problem(self) -> str:
        """Wait for it."""
        self.page.wait_for_selector("#problem", state="visible")
        return self.text("problem")

    def note(self) -> str:
        """The line below the newest answer."""
        return self.page.locator(".answer .meta").last.inner_text()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def shot(self, path: Path, **options: Any) -> None:
        self.settle()
        self.page.screenshot(path=path, **options)

    def settle(self) -> None:
        self.page.wait_for_timeout(400)  # the overlay fades in

    def end(self, report: Report, name: str) -> None:
        found = [*self.complaints, *self.page.evaluate("window.violations")]
        report.row(f"{name}: console, requests, policy", not found, found or "")
        self.page.close()
