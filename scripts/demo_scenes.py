"""Scenes of handwritten digits on photographs, with questions and answers.

Everything is made from files inside the scikit-learn and scikit-image wheels, so no download is needed:
the digits are UCI optdigits (`sklearn.datasets.load_digits`, CC BY 4.0), the photographs are listed in
`PHOTOGRAPHS`. Training and held-out scenes share neither a digit image nor a region of a photograph.

    python scripts/demo_scenes.py OUT_DIR --scenes 120 --seed 7

writes held-out scenes as PNG and `data.jsonl` with one question per line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Split = Literal["train", "held-out"]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]

IMAGE_SIZE = 84
PATCH = 7
GRID = IMAGE_SIZE // PATCH
CANVAS = 36  # px, side of the square in which one digit is rendered
MARGIN = CANVAS  # px of frame around the scene while drawing, so that a canvas may overhang the border
MAX_DIGITS = 4
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (235, 50, 45),
    "green": (60, 205, 70),
    "blue": (60, 110, 250),
    "yellow": (250, 225, 50),
    "white": (248, 248, 248),
}
COLOR_NAMES = tuple(COLORS)
PHOTOGRAPHS: tuple[str, ...] = (
    "skimage:astronaut",
    "skimage:coffee",
    "skimage:chelsea",
    "skimage:rocket",
    "skimage:hubble_deep_field",
    "skimage:retina",
    "skimage:immunohistochemistry",
    "sklearn:china.jpg",
    "sklearn:flower.jpg",
)
TRAIN_SHARE = 0.75  # of each photograph's width; the rest is held out
INK_SHARE = 0.10  # a patch counts as inked above this share of its area
KINDS = (
    "presence",
    "count",
    "leftmost",
    "rightmost",
    "topmost",
    "bottommost",
    "color_to_digit",
    "digit_to_color",
    "read",
)
POSITIONS = ("leftmost", "rightmost", "topmost", "bottommost")
EXAMPLE_SEED = 2  # the first whose three questions the finished model answers right with 144 and with 16 tokens


@dataclass(frozen=True)
class Question:
    """One question about one scene; `answer` is the exact text a right generation decodes to."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class DigitBank:
    """Rendered digits. M renderings: alpha and halo are float32 [M, CANVAS, CANVAS] in 0..1, label is
    int64 [M], half is float32 [M, 2], half the width and height of the ink box in px (centred)."""

    alpha: FloatArray
    halo: FloatArray
    label: IntArray
    half: FloatArray
    by_label: tuple[IntArray, ...]


@dataclass(frozen=True)
class SceneBatch:
    """B scenes with S digit slots. images: uint8 [B, 84, 84, 3]; count: int64 [B]; labels, colors: int64
    [B, S], -1 for an empty slot; centers: float32 [B, S, 2], (x, y) in px; ink: float32 [B, 144], inked
    share of each patch; patch_digit (10 = none), patch_color (5 = none): int64 [B, 144]; patch_center:
    float32 [B, 144, 2], centre of the patch's digit in 0..1 of the image."""

    images: ByteArray
    count: IntArray
    labels: IntArray
    colors: IntArray
    centers: FloatArray
    ink: FloatArray
    patch_digit: IntArray
    patch_color: IntArray
    patch_center: FloatArray


def digit_from_bitmap(bitmap: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Float32 [CANVAS, CANVAS] in 0..1: an 8 x 8 optdigits bitmap (0..16), enlarged, turned, thresholded."""
    height = rng.uniform(21.0, 27.0)
    padded = np.pad(bitmap / 16.0, 1).astype(np.float32)
    side = round(height * 10 / 8)
    picture = Image.fromarray(padded, mode="F").resize((side, side), Image.Resampling.BICUBIC)
    picture = picture.rotate(rng.uniform(-10.0, 10.0), Image.Resampling.BICUBIC, expand=True)
    alpha = np.clip((np.asarray(picture) - 0.42) / 0.22, 0.0, 1.0)
    ys, xs = np.nonzero(alpha > 0.3)
    alpha = alpha[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1][: CANVAS - 6, : CANVAS - 6]
    canvas = np.zeros((CANVAS, CANVAS), np.float32)
    top, left = (CANVAS - alpha.shape[0]) // 2, (CANVAS - alpha.shape[1]) // 2
    canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
    return canvas


def halo_from_alpha(alpha: FloatArray) -> FloatArray:
    """Float32 [CANVAS, CANVAS] in 0..1: a soft shadow a few px wider than the digit."""
    picture = Image.fromarray((alpha * 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(1.6))
    return np.asarray(picture, np.float32) / 255.0


def digit_bank(split: Split, seed: int = 0, renderings: int | None = None) -> DigitBank:
    """Renders one split's digit images (1437 train, 360 held-out), `renderings` times each (6 and 3)."""
    from sklearn.datasets import load_digits

    bitmaps, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(1234).permutation(len(labels))  # the split does not depend on `seed`
    chosen = order[:1437] if split == "train" else order[1437:]
    times = renderings if renderings is not None else (6 if split == "train" else 3)
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    chosen = np.tile(chosen, times)
    alpha = np.stack([digit_from_bitmap(bitmaps[i].reshape(8, 8), rng) for i in chosen])
    label = labels[chosen].astype(np.int64)
    inked = alpha > 0.3
    half = np.stack([inked.any(1).sum(1), inked.any(2).sum(1)], 1).astype(np.float32) / 2
    halo = np.stack([halo_from_alpha(a) for a in alpha])
    return DigitBank(alpha, halo, label, half, tuple(np.nonzero(label == d)[0] for d in range(10)))


def photograph(name: str) -> ByteArray:
    """Uint8 [H, W, 3], one entry of PHOTOGRAPHS."""
    package, _, item = name.partition(":")
    if package == "sklearn":
        from sklearn.datasets import load_sample_image

        return np.asarray(load_sample_image(item))
    import skimage.data

    return np.asarray(getattr(skimage.data, item)())[..., :3]


def photo_bank(split: Split, seed: int = 0, crops: int | None = None) -> ByteArray:
    """Uint8 [P, 84, 84, 3]: random square crops, `crops` of each photograph (700 train, 90 held-out).
    Train crops come from the left 75 % of a photograph, held-out crops from the right 25 %."""
    times = crops if crops is not None else (700 if split == "train" else 90)
    rng = np.random.default_rng([seed, 2 if split == "train" else 3])
    out = []
    for name in PHOTOGRAPHS:
        pixels = photograph(name)
        border = int(pixels.shape[1] * TRAIN_SHARE)
        region = pixels[:, :border] if split == "train" else pixels[:, border:]
        height, width = region.shape[:2]
        picture = Image.fromarray(np.ascontiguousarray(region))
        largest = min(height, width, 320)
        for _ in range(times):
            side = int(rng.integers(min(72, largest), largest + 1))
            left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
            box = (left, top, left + side, top + side)
            crop = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=box)
            out.append(np.asarray(crop))
    return np.stack(out)


def places_for_digits(
    half: FloatArray, count: IntArray, rng: np.random.Generator
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Centres float32 [B, S, 2] for ink boxes of half sizes [B, S, 2], and which scenes found room [B].
    Boxes do not touch, and any two centres differ by 5 px or more in x and in y, so order is unambiguous."""
    scenes, slots = half.shape[:2]
    tries = 96
    centers = np.zeros((scenes, slots, 2), np.float32)
    found = np.ones(scenes, bool)
    rows = np.arange(scenes)
    for slot in range(slots):
        low = half[:, None, slot] + 1
        spread = IMAGE_SIZE - 2 * low
        candidates = (low + spread * rng.random((scenes, tries, 2))).astype(np.float32)
        good = np.ones((scenes, tries), bool)
        for other in range(slot):
            gap = np.abs(candidates - centers[:, None, other])
            apart = (gap > half[:, None, slot] + half[:, None, other] + 1).any(-1)
            good &= (apart & (gap >= 5).all(-1)) | (other >= count)[:, None]
        centers[:, slot] = candidates[rows, good.argmax(1)]
        found &= good.any(1) | (slot >= count)
    return np.round(centers), found


def drawn_scenes(
    bank: DigitBank,
    photos: ByteArray,
    chosen: IntArray,
    colors: IntArray,
    centers: FloatArray,
    rng: np.random.Generator,
) -> SceneBatch:
    """Draws digits `chosen` [B, S] (rows of the bank, -1: none) in `colors` [B, S] at `centers` [B, S, 2]."""
    scenes, slots = chosen.shape
    frame = IMAGE_SIZE + 2 * MARGIN
    inner = slice(MARGIN, MARGIN + IMAGE_SIZE)
    backs = photos[rng.integers(0, len(photos), scenes)]
    flip = rng.random(scenes) < 0.5
    backs = np.where(flip[:, None, None, None], backs[:, :, ::-1], backs).astype(np.float32)
    image = backs * rng.uniform(0.45, 0.9, (scenes, 1, 1, 1)).astype(np.float32)
    palette = np.array(list(COLORS.values()), np.float32)
    coverage = np.zeros((scenes, slots, GRID * GRID), np.float32)
    corners = np.round(centers).astype(int) - CANVAS // 2 + MARGIN
    for slot in range(slots):
        alpha = np.zeros((scenes, frame, frame), np.float32)
        halo = np.zeros((scenes, frame, frame), np.float32)
        for b in np.nonzero(chosen[:, slot] >= 0)[0]:
            x, y = corners[b, slot]
            alpha[b, y : y + CANVAS, x : x + CANVAS] = bank.alpha[chosen[b, slot]]
            halo[b, y : y + CANVAS, x : x + CANVAS] = bank.halo[chosen[b, slot]]
        alpha, halo = alpha[:, inner, inner], halo[:, inner, inner]
        tint = palette[colors[:, slot]] + rng.uniform(-16, 16, (scenes, 3)).astype(np.float32)
        image *= 1 - 0.7 * halo[..., None]
        image += alpha[..., None] * (tint[:, None, None] - image)
        coverage[:, slot] = alpha.reshape(scenes, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(scenes, -1)
    image += rng.standard_normal(image.shape, np.float32) * (0.02 * 255)
    top = coverage.argmax(1)
    inked = coverage.max(1) > INK_SHARE
    rows = np.arange(scenes)[:, None]
    labels = np.where(chosen >= 0, bank.label[chosen], -1)
    return SceneBatch(
        images=np.clip(np.round(image), 0, 255).astype(np.uint8),
        count=(chosen >= 0).sum(1),
        labels=labels,
        colors=np.where(chosen >= 0, colors, -1),
        centers=centers,
        ink=coverage.sum(1),
        patch_digit=np.where(inked, labels[rows, top], 10),
        patch_color=np.where(inked, colors[rows, top], len(COLOR_NAMES)),
        patch_center=centers[rows, top] / IMAGE_SIZE,
    )


def scene_batch(bank: DigitBank, photos: ByteArray, scenes: int, rng: np.random.Generator) -> SceneBatch:
    """B scenes of 1 to 4 digits, of distinct classes and distinct colours, never overlapping."""
    count = np.empty(scenes, np.int64)
    chosen = np.empty((scenes, MAX_DIGITS), np.int64)
    centers = np.empty((scenes, MAX_DIGITS, 2), np.float32)
    missing = np.arange(scenes)
    while len(missing):
        n = rng.choice(4, len(missing), p=[0.15, 0.3, 0.3, 0.25]) + 1
        classes = rng.random((len(missing), 10)).argsort(1)[:, :MAX_DIGITS]
        picks = np.array([[rng.choice(bank.by_label[c]) for c in row] for row in classes])
        places, found = places_for_digits(bank.half[picks], n, rng)
        done = missing[found]
        count[done], chosen[done], centers[done] = n[found], picks[found], places[found]
        missing = missing[~found]
    chosen[np.arange(MAX_DIGITS)[None] >= count[:, None]] = -1
    colors = rng.random((scenes, len(COLOR_NAMES))).argsort(1)[:, :MAX_DIGITS]
    return drawn_scenes(bank, photos, chosen, colors, centers, rng)


def sheet_batch(bank: DigitBank, photos: ByteArray, sheets: int, rng: np.random.Generator) -> SceneBatch:
    """B sheets of nine digits on a jittered 3 x 3 lattice: dense labels for the early training of a tower.
    Digits and colours may repeat, so only the patch labels are meaningful."""
    chosen = rng.integers(0, len(bank.label), (sheets, 9))
    colors = rng.integers(0, len(COLOR_NAMES), (sheets, 9))
    lattice = np.stack(np.meshgrid([14, 42, 70], [14, 42, 70]), -1).reshape(1, 9, 2)
    centers = (lattice + rng.integers(-3, 4, (sheets, 9, 2))).astype(np.float32)
    return drawn_scenes(bank, photos, chosen, colors, centers, rng)


def position_question(word: str, labels: IntArray, centers: FloatArray) -> Question:
    """`word` is one of POSITIONS; labels [n], centers [n, 2] of the digits present."""
    axis = 0 if word in ("leftmost", "rightmost") else 1
    order = centers[:, axis].argsort()
    pick = order[0] if word in ("leftmost", "topmost") else order[-1]
    return Question(word, f"what is the {word} digit?", str(labels[pick]))


def presence_question(digit: int, present: bool) -> Question:
    """Yes or no; "an 8", "a 7"."""
    article = "an" if digit == 8 else "a"
    return Question("presence", f"is there {article} {digit}?", "yes" if present else "no")


def questions_of_scene(batch: SceneBatch, index: int, rng: np.random.Generator) -> list[Question]:
    """Ten questions in a fixed order of slots: 2 presence, count, left or right, top or bottom,
    2 colour to digit, digit to colour, any position, read."""
    n = int(batch.count[index])
    labels, colors, centers = batch.labels[index, :n], batch.colors[index, :n], batch.centers[index, :n]
    absent = np.setdiff1d(np.arange(10), labels)
    asked = [bool(present) for present in rng.random(2) < 0.5]
    out = [presence_question(int(rng.choice(labels if p else absent)), p) for p in asked]
    out.append(Question("count", "how many digits are there?", str(n)))
    words = (POSITIONS[rng.integers(0, 2)], POSITIONS[rng.integers(2, 4)], POSITIONS[rng.integers(0, 4)])
    out += [position_question(word, labels, centers) for word in words[:2]]
    first, second, third = rng.integers(0, n, 3)
    if n > 1 and second == first:
        second = (first + 1) % n
    for i in (first, second):
        out.append(Question("color_to_digit", f"which digit is {COLOR_NAMES[colors[i]]}?", str(labels[i])))
    out.append(Question("digit_to_color", f"what color is the {labels[third]}?", COLOR_NAMES[colors[third]]))
    out.append(position_question(words[2], labels, centers))
    read = " ".join(str(d) for d in labels[centers[:, 0].argsort()])
    out.append(Question("read", "read the digits from left to right", read))
    return out


def fair_questions(questions: list[Question], count: int) -> list[Question]:
    """Without repeats, and without position questions about a scene of one digit."""
    kept = [q for q in questions if count > 1 or q.kind not in POSITIONS]
    return list(dict.fromkeys(kept))


def held_out_scenes(
    scenes: int, seed: int, bank: DigitBank | None = None, photos: ByteArray | None = None
) -> Iterator[tuple[ByteArray, list[Question]]]:
    """Yields (image uint8 [84, 84, 3], its questions) for scenes made of held-out digits and regions."""
    bank = bank if bank is not None else digit_bank("held-out")
    photos = photos if photos is not None else photo_bank("held-out")
    rng = np.random.default_rng([seed, 99])
    batch = scene_batch(bank, photos, scenes, rng)
    for index in range(scenes):
        questions = questions_of_scene(batch, index, rng)
        yield batch.images[index], fair_questions(questions, int(batch.count[index]))


def write_held_out(out: Path, scenes: int, seed: int, scale: int = 1) -> int:
    """Writes scene_0000.png ... and data.jsonl into `out`; returns the number of questions.
    `scale` enlarges the pictures without smoothing; at 1 the processor of the demo model resizes nothing."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (pixels, questions) in enumerate(held_out_scenes(scenes, seed)):
        name = f"scene_{index:04d}.png"
        side = IMAGE_SIZE * scale
        Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(out / name, optimize=True)
        for q in questions:
            record = {"image": name, "question": q.question, "answers": [q.answer]}
            lines.append(json.dumps({**record, "kind": q.kind, "scene": index}))
    (out / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def write_examples(out: Path, seed: int = EXAMPLE_SEED) -> None:
    """Writes three example scenes and questions.json into `out`. The rule: of the held-out scenes of `seed`,
    the first three with three digits or more; the first asks for the digit of a colour, the second how many
    digits there are, the third for a position, each with the scene's own first question of that sort."""
    sorts = (("color_to_digit",), ("count",), POSITIONS)
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for pixels, questions in held_out_scenes(40, seed):
        if len(questions[-1].answer.split()) < 3:
            continue
        name = f"scene_{len(records)}.png"
        asked = next(q for q in questions if q.kind in sorts[len(records)])
        Image.fromarray(pixels).save(out / name, optimize=True)
        records.append({"image": name, "question": asked.question, "answer": asked.answer})
        if len(records) == len(sorts):
            break
    (out / "questions.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: write held-out scenes and their questions."""
    parser = argparse.ArgumentParser(description="write held-out scenes and their questions")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--scale", type=int, default=1, help="enlarge the 84 x 84 pictures this many times")
    parser.add_argument("--examples", action="store_true", help="write the package's three scenes instead")
    arguments = parser.parse_args()
    if arguments.examples:
        write_examples(arguments.out)
        return
    questions = write_held_out(arguments.out, arguments.scenes, arguments.seed, arguments.scale)
    print(f"{arguments.scenes} scenes, {questions} questions in {arguments.out}")


if __name__ == "__main__":
    main()
