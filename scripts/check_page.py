#!/usr/bin/env python3
"""Uses the page of `holov-export serve` in a headless Chromium, against two real servers.

    scripts/check_page                  makes what is needed and runs this file

The demo model answers: a scene is dropped, asked about and asked about again with another budget; the kept tokens on
the screen are compared with the boxes that the server gives to a client without a browser, also for a photograph that
is stored turned (EXIF). A random LLaVA talks for seconds behind an API key, a budget controller and a queue of one: its
answer must grow on the page, and Stop must end it in the server. Then errors, several pictures, the clipboard, the
keyboard, narrow windows. Nothing may be asked of another host, and neither the console nor the page's
Content-Security-Policy may complain.

Screenshots are left in --work. Ends with status 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

from page_visit import GIVE_FILES, KEY, SCENES, File, Report, Server, Visit, scene, server
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

HOW_MANY, LEFTMOST = "how many digits are there?", "what is the leftmost digit?"
#: opacity of every pixel of the overlay, and the size that the browser has for the picture
OVERLAY = """() => {
  const canvas = document.getElementById("overlay"), image = document.getElementById("picture");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return { width: canvas.width, height: canvas.height, size: [image.naturalWidth, image.naturalHeight],
           alpha: Array.from({ length: data.length / 4 }, (_, index) => data[4 * index + 3]) };
}"""
#: where the focus is
FOCUS = "document.activeElement.id || document.activeElement.tagName.toLowerCase()"
UNLABELLED = """[...document.querySelectorAll("input, textarea, button")].filter((item) =>
  !item.textContent.trim() && !item.labels?.length && !item.ariaLabel).map((item) => item.id)"""


def check_screen(visit: Visit, report: Report, kept: dict[str, Any]) -> None:
    """On the screen, the middles of kept tokens must show the picture as it is, those of the others be darker."""
    visit.settle()
    lit = grey_screenshot(visit)
    visit.page.uncheck("#show-kept")
    visit.settle()
    plain = grey_screenshot(visit)
    visit.page.check("#show-kept")
    (wide, high), boxes = kept["size"], kept["boxes"]
    step = boxes[0][2] - boxes[0][0]
    inside, outside = [], []
    for row in range(round(high / step)):
        for column in range(round(wide / step)):
            x, y = (column + 0.5) * step, (row + 0.5) * step
            at = int(x / wide * lit.width), int(y / high * lit.height)
            seen = lit.getpixel(at), plain.getpixel(at)
            (inside if distance_inside(boxes, x, y) > 0 else outside).append(seen)
    same = all(abs(now - before) <= 2 for now, before in inside)
    darker = all(now < 0.5 * before + 8 for now, before in outside)
    good = same and darker and len(inside) == kept["tokens"] and len(outside) == kept["of"] - kept["tokens"]
    report.row("kept boxes are lit, the rest is dimmed", good, f"{len(inside)} and {len(outside)} tokens")


def grey_screenshot(visit: Visit) -> Image.Image:
    return Image.open(io.BytesIO(visit.page.locator("#frame").screenshot())).convert("L")


def distance_inside(boxes: list[list[float]], x: float, y: float) -> float:
    """How far a place is inside the box that holds it best; negative outside of all."""
    return max(min(x - left, right - x, y - top, bottom - y) for left, top, right, bottom in boxes)


def check_demo(browser: Browser, served: Server, work: Path, report: Report) -> None:
    """Answers, overlays, budgets and the conversation, with the demo model."""
    truth = {item["question"]: item["answer"] for item in json.loads((SCENES / "questions.json").read_text("utf-8"))}
    visit = Visit(browser, served.url)
    report.row("the page names the model", visit.text("facts").startswith("demo · holov"), visit.text("facts"))
    visit.shot(work / "page-empty.png")
    visit.ask(HOW_MANY)
    report.row("a question without a picture", visit.problem() == "Add a picture first.", visit.problem())
    visit.give("drop", scene(1))
    words = visit.answer(HOW_MANY)
    report.row("scene_1.png dropped, asked", words == truth[HOW_MANY], words)
    budget = int(visit.page.input_value("#budget"))
    check_screen(visit, report, served.kept(scene(1), HOW_MANY, budget=budget))
    stages = visit.text("stages").split("\n")[::2]
    named = {"queue", "preprocess", "vision", "prefill", "decode"} <= set(stages) and "first token" in visit.text(
        "ttft"
    )
    report.row("time per stage", named, ", ".join(stages))
    for tokens in (1, 144, 8):
        visit.again(tokens)
        says = visit.text("count")
        report.row(f"slider at {tokens}", says.startswith(f"{tokens} of 144 tokens"), says)
    report.row("earlier answers stay in sight", visit.count(".answer") == 4 and visit.count(".answer.older") == 3)
    visit.again(32)
    visit.answer("which digit is <b id=injected>white</b>?")
    messages = visit.asked[-1]["messages"]
    roles = [message["role"] for message in messages]
    types = [[part["type"] for part in message["content"]] for message in messages if message["role"] == "user"]
    follows = roles == ["user", "assistant", "user"] and types == [["image_url", "text"], ["text"]]
    report.row("a follow-up sends the turns, the picture once", follows, roles)
    report.row("words are not read as HTML", visit.count("#injected") == 0)
    visit.shot(work / "page-light.png")
    visit.page.emulate_media(color_scheme="dark")
    visit.shot(work / "page-dark.png")
    visit.page.click("#clear")
    report.row("start over", visit.count(".said") == 0 and visit.page.is_visible("#silence"))
    check_turned(visit, served, report)
    check_pictures(visit, report)
    visit.end(report, "demo")


def check_turned(visit: Visit, served: Server, report: Report) -> None:
    """A pasted JPEG that is stored on its side, with the EXIF tag that says so."""
    upright = Image.open(SCENES / "scene_1.png").convert("RGB").crop((0, 0, 84, 60)).resize((336, 240))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise by 90 degrees to see it
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=95, exif=exif)
    file = File("turned.jpg", "image/jpeg", buffer.getvalue())
    visit.give("paste", file)
    visit.choose(24)
    visit.answer(HOW_MANY)
    kept, overlay = served.kept(file, HOW_MANY, budget=24), visit.page.evaluate(OVERLAY)
    report.row("a turned photograph is upright on both sides", kept["size"] == overlay["size"] == [336, 240])
    scale, wrong, looked = overlay["width"] / kept["size"][0], 0, 0
    for y in range(2, overlay["height"], 5):
        for x in range(2, overlay["width"], 5):
            inside = distance_inside(kept["boxes"], (x + 0.5) / scale, (y + 0.5) / scale)
            if abs(inside) * scale > 4:  # edges have a line
                looked += 1
                wrong += (overlay["alpha"][y * overlay["width"] + x] == 0) != (inside > 0)
    report.row("its boxes are where the server has them", wrong == 0 and looked > 1000, f"{wrong} of {looked} wrong")
    visit.page.click("#clear")


def check_pictures(visit: Visit, report: Report) -> None:
    """Several pictures, and files that are none."""
    visit.page.set_input_files("#files", [SCENES / "scene_0.png", SCENES / "scene_2.png"])
    visit.wait("document.querySelectorAll('#strip li').length === 2")
    visit.page.click("#strip .remove >> nth=0")
    visit.give("drop", scene(1))
    visit.answer(LEFTMOST)
    parts = [part["type"] for part in visit.asked[-1]["messages"][0]["content"]]
    report.row("two pictures, a third was taken back", parts == ["image_url", "image_url", "text"], visit.note())
    before, _ = visit.page.get_attribute("#picture", "alt"), visit.page.click("#strip .thumb >> nth=0")
    names = before, visit.page.get_attribute("#picture", "alt")
    report.row("the strip shows the other one", names == ("scene_1.png", "scene_2.png"), " then ".join(names))
    visit.page.evaluate(GIVE_FILES, ["drop", [("notes.txt", "text/plain", "aGVsbG8=")]])
    report.row("a text file", "notes.txt" in visit.problem(), visit.problem())
    visit.give("drop", *[scene(0)] * 7)
    visit.answer(HOW_MANY)
    given_back = visit.page.input_value("#question") == HOW_MANY and visit.count("#strip .remove") == 7
    report.row("nine pictures; the question comes back", "9 images" in visit.problem() and given_back, visit.problem())


def check_windows(browser: Browser, served: Server, work: Path, report: Report) -> None:
    """Phones, and use without a mouse."""
    for width in (320, 390, 820):
        visit = Visit(browser, served.url, width=width, height=760, dark=width == 390)
        visit.give("drop", scene(2))
        visit.answer(LEFTMOST)
        if width == 390:
            visit.shot(work / "page-phone.png", full_page=True)
        visit.answer("verylongword" * 12)
        needed = visit.page.evaluate("document.documentElement.scrollWidth")
        report.row(f"{width} px wide: no sideways scrolling", needed <= width, f"{needed} px")
        visit.end(report, f"{width} px")
    visit = Visit(browser, served.url)
    expected, reached = ["summary", "files", "show-kept", "budget", "clear", "log", "question", "send"], []
    for _ in expected:
        visit.page.keyboard.press("Tab")
        reached.append(visit.page.evaluate(FOCUS))
    report.row("Tab reaches everything", reached == expected, " ".join(reached))
    report.row("every control has a label", visit.page.evaluate(UNLABELLED) == [])
    visit.end(report, "keyboard")


def check_guarded(browser: Browser, served: Server, work: Path, report: Report) -> None:
    """The key, the controller, streaming, Stop, and refusals, with a model that talks for seconds."""
    visit = Visit(browser, served.url)
    asked_for = "needs an API key" in visit.text("facts") and visit.page.is_visible("#key")
    report.row("without a key", asked_for, visit.text("facts"))
    visit.page.fill("#key", "wrong")
    visit.page.press("#key", "Enter")
    visit.wait("document.getElementById('facts').textContent.includes('refuses')")
    report.row("a wrong key", visit.page.is_visible("#key"), visit.text("facts"))
    visit.shot(work / "page-key.png")
    visit.page.fill("#key", KEY)
    visit.page.press("#key", "Enter")
    visit.page.wait_for_selector("#key", state="hidden")
    visit.open()
    stored = visit.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]")
    report.row("the right key, kept over a reload for this tab only", stored == [1, 0, ""], visit.text("facts"))
    chosen = visit.page.is_checked("#automatic") and visit.page.is_disabled("#budget")
    report.row("automatic budget", chosen, visit.text("automatic-row"))
    check_stop(visit, served, report)
    visit.page.uncheck("#automatic")
    visit.choose(1)
    visit.page.click("text=Ask again")
    visit.wait("document.getElementById('count').textContent.startsWith('1 of 576')")
    visit.page.keyboard.press("Escape")
    visit.done()
    report.row("one token, stopped with Escape", visit.asked[-1]["budget"] == 1 and "stopped" in visit.note())
    check_refusals(visit, served, report)
    visit.end(report, "random")


def check_stop(visit: Visit, served: Server, report: Report) -> None:
    visit.give("drop", scene(1))
    visit.page.evaluate("window.lengths.length = 0")
    visit.ask("what is this?")
    visit.wait("new Set(window.lengths).size > 12")
    visit.page.click("#stop")
    words, ended = visit.done(), served.decodes(0)
    lengths = visit.page.evaluate("new Set(window.lengths).size")
    report.row("the answer grows token by token", 12 < lengths < 256, f"seen with {lengths} lengths")
    report.row("Stop ends it here", "stopped" in visit.note(), f"{len(words)} characters")
    report.row("and in the server", ended is not None, "" if ended is None else f"after {ended:.2f} s")
    visit.settle()
    report.row("nothing comes after it", visit.page.locator(".answer .text").last.inner_text().strip() == words)
    report.row("no budget was named", "budget" not in visit.asked[-1], visit.text("count"))


def check_refusals(visit: Visit, served: Server, report: Report) -> None:
    served.decodes(0)
    more = {"max_tokens": 500, "budget": 576}
    other = threading.Thread(target=served.kept, args=(scene(1), "what is this?"), kwargs=more, daemon=True)
    other.start()
    served.decodes(1)
    visit.answer("what is this?")
    said = visit.problem()
    report.row("429 while another is answered", "busy" in said and "Try again in" in said, said)
    other.join(60)
    noise = io.BytesIO()
    Image.frombytes("RGB", (300, 300), random.Random(1).randbytes(270_000)).save(noise, "PNG")
    visit.give("drop", File("noise.png", "image/png", noise.getvalue()))
    visit.answer("what is this?")
    report.row("413", visit.problem().startswith("Too large"), visit.problem())


def draw_documentation(browser: Browser, served: Server, path: Path) -> None:
    """The picture of the page in the documentation."""
    visit = Visit(browser, served.url, height=812)
    visit.give("drop", scene(1))
    visit.choose(144)
    visit.answer(HOW_MANY)
    visit.again(16)
    visit.answer(LEFTMOST)
    visit.page.evaluate("document.activeElement.blur()")
    visit.shot(path)
    visit.page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", required=True, help="Chromium's program")
    parser.add_argument("--work", type=Path, required=True, help="folder of the two bundles; screenshots go there")
    parser.add_argument("--image", type=Path, help="write the documentation's screenshot")
    options = parser.parse_args()
    report = Report()
    guarded = ("--api-key", KEY, "--target-ttft", "500ms", "--queue", "1", "--max-body", "100kB")
    arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []  # Chromium's needs another user
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=arguments)
        print(f"Chromium {browser.version}", flush=True)
        with server(options.work / "demo") as served:
            check_demo(browser, served, options.work, report)
            check_windows(browser, served, options.work, report)
            if options.image:
                draw_documentation(browser, served, options.image)
        with server(options.work / "random", *guarded) as served:
            check_guarded(browser, served, options.work, report)
        browser.close()
    print("everything as it should be" if report.good else "NOT as it should be")
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
