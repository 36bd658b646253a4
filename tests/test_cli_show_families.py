"""`holov-export show` on bundles of every family: which tokens are lit, what is said, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn_panels import UNDER_BLOCK_CAPTION, Texts, lit_tokens, record
from family_checkpoints import write_family
from PIL import Image

from holov_export.bundle import Bundle, read_manifest
from holov_export.cli import run
from holov_export.pipeline import export_bundle
from holov_export.policies import policy_from_settings
from holov_export.request import ExportRequest, GraphRequest
from holov_export.runtime.preprocess import pixels_from_pictures
from holov_export.runtime.runner import Runner
from holov_export.runtime.runner_choice import runner_from_bundle
from holov_export.runtime.session import Session
from holov_export.spec import Precision
from holov_export.verify.panels import Subject, panels_from_bundle, subject_from_clip, subject_from_picture
from holov_export.verify.picture import picture_of_panels

#: several exports; scripts/test-slow runs them
pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]
FRAMES = 20


def exported(folder: Path, family: str, *methods: str) -> Bundle:
    first, *others = map(policy_from_settings, methods)
    request = ExportRequest(
        model=str(write_family(folder / "checkpoint", family)),
        policy=first,
        also=tuple(map(GraphRequest, others)),
        precision=Precision.FP32,
        decoder=None,
        output=folder / "bundle",
        verify=False,
    )
    return export_bundle(request)[0]


@pytest.fixture(scope="module")
def next_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("next"), "llava_next", "holov")


@pytest.fixture(scope="module")
def qwen_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl", "holov-official", "holov")


@pytest.fixture(scope="module")
def video_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("video"), "video_llava", "holov")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]) -> Path:
    """A photograph without black: what is pruned can be told from what is lit."""
    path = tmp_path_factory.mktemp("photo") / "coffee.png"
    _lightened(photographs[1]).save(path)
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]) -> Path:
    """A folder of frames across that photograph; no two are equal."""
    folder = tmp_path_factory.mktemp("clip") / "frames"
    folder.mkdir()
    picture = _lightened(photographs[1])
    for number in range(FRAMES):
        picture.crop((9 * number, 40, 9 * number + 400, 340)).save(folder / f"{number}.png")
    return folder


def _lightened(picture: Image.Image) -> Image.Image:
    return picture.point(lambda level: 120 + level // 2)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    return record(monkeypatch)


def lit_of(drawn: Image.Image, texts: Texts, subject: Subject, caption: str) -> list[int]:
    """Positions of the kept tokens that the block under a caption shows; without CLS tokens of frames."""
    plain = texts.captions[0]
    if not subject.views[0].name:
        corners = [
            [next(said for said in texts if said.text == text).corner(UNDER_BLOCK_CAPTION)] for text in (plain, caption)
        ]
    else:
        corners = [[said.corner() for said in texts.below(text)] for text in (plain, caption)]
    found, start = [], 0
    for view, before, after in zip(subject.views, *corners, strict=True):
        if view.seen is not None:
            found += [start + view.region.cls + token for token in lit_tokens(drawn, before, after, view)]
        start += view.region.tokens
    return found


def caption_of(texts: Texts, method: str) -> str:
    (caption,) = {text for text in texts.captions if text.startswith(f"{method}: ")}
    return caption


def shown(out: Path, bundle: Bundle, *arguments: str) -> Image.Image:
    assert run(["show", str(bundle.folder), *arguments, "-o", str(out), "--provider", "cpu"]) == 0
    with Image.open(out) as picture:
        return picture.convert("RGB")


class TestPictures:
    def test_tiles(self, next_bundle: Bundle, photo: Path, tmp_path: Path, texts: Texts) -> None:
        drawn = shown(tmp_path / "kept.png", next_bundle, str(photo), "--methods", "holov,uniform", "--budget", "20")
        subject = subject_from_picture(photo, next_bundle.manifest.plan.model, 480)
        assert [view.region.grid for view in subject.views] == [(4, 4), (6, 8)]
        assert [said.text for said in texts.below(texts.captions[0])] == [
            "whole picture: 16 tokens",
            "tiles: 48 tokens",
        ]
        with Session.open(next_bundle, decoder="none", provider="cpu") as session:
            kept = session.see([photo], budget=20).positions[0]
        assert lit_of(drawn, texts, subject, "holov: 20 of 64") == sorted(kept.tolist())
        small = int((kept < 16).sum())
        assert 0 < small < 16
        counts = [f"whole picture: {small} of 16", f"tiles: {20 - small} of 48"]
        assert [said.text for said in texts.below("holov: 20 of 64")] == counts
        assert lit_of(drawn, texts, subject, "uniform: 20 of 64") == [(2 * k + 1) * 64 // 40 for k in range(20)]

    def test_a_ninth_of_its_own_tokens_is_usual(
        self, next_bundle: Bundle, photo: Path, tmp_path: Path, texts: Texts
    ) -> None:
        shown(tmp_path / "kept.png", next_bundle, str(photo))
        assert "holov: 7 of 64" in texts.captions, "not 9, a ninth of the largest picture's 80"

    def test_more_than_it_has_keeps_all(self, next_bundle: Bundle, photo: Path, tmp_path: Path, texts: Texts) -> None:
        drawn = shown(tmp_path / "kept.png", next_bundle, str(photo), "--budget", "80", "--methods", "cls-topk")
        subject = subject_from_picture(photo, next_bundle.manifest.plan.model, 480)
        assert lit_of(drawn, texts, subject, "cls-topk: 64 of 64") == list(range(64))

    def test_no_tokens_of_the_tiles(self, next_bundle: Bundle, tmp_path: Path, texts: Texts) -> None:
        """So thin a picture leaves only padding in each column."""
        thin = tmp_path / "thin.png"
        Image.new("RGB", (1, 500), (200, 180, 160)).save(thin)
        (layout,) = pixels_from_pictures([thin], next_bundle.manifest.plan.model).layouts
        assert layout.regions[1].tokens == 0
        drawn = shown(tmp_path / "kept.png", next_bundle, str(thin), "--budget", "5", "--methods", "holov,cls-topk")
        subject = subject_from_picture(thin, next_bundle.manifest.plan.model, 480)
        for method in ("holov", "cls-topk"):
            caption = f"{method}: 5 of 16"
            assert [said.text for said in texts.below(caption)] == ["whole picture: 5 of 16", "tiles: no tokens"]
        assert len(lit_of(drawn, texts, subject, "cls-topk: 5 of 16")) == 5

    def test_any_aspect_ratio(self, qwen_bundle: Bundle, photo: Path, tmp_path: Path, texts: Texts) -> None:
        upright = tmp_path / "upright.png"
        with Image.open(photo) as picture:
            picture.crop((200, 0, 330, 400)).save(upright)
        subject = subject_from_picture(upright, qwen_bundle.manifest.plan.model, 480)
        (view,) = subject.views
        assert view.region.grid == (14, 5)
        drawn = shown(tmp_path / "kept.png", qwen_bundle, str(upright), "--methods", "holov,cls-topk", "--budget", "12")
        with Session.open(qwen_bundle, method="holov", decoder="none", provider="cpu") as session:
            seen = session.see([upright], budget=12)
        assert lit_of(drawn, texts, subject, "holov: 12 of 70") == sorted(seen.positions[0].tolist())
        assert seen.saliency is not None
        most = np.sort(np.argsort(-seen.saliency[0], kind="stable")[:12])
        assert lit_of(drawn, texts, subject, "cls-topk: 12 of 70") == most.tolist()

    def test_the_word_before_the_picture(self, qwen_bundle: Bundle, photo: Path, tmp_path: Path, texts: Texts) -> None:
        """The published code keeps the last token always, and at a large budget the word before the first."""
        subject = subject_from_picture(photo, qwen_bundle.manifest.plan.model, 480)
        count = subject.tokens
        with Session.open(qwen_bundle, method="holov-official", decoder="none", provider="cpu") as session:
            kept = session.see([photo], budget=count - 3).positions[0]
        assert (kept == count).any(), "a budget of nearly all tokens was to keep the word"
        drawn = shown(tmp_path / "kept.png", qwen_bundle, str(photo), "--budget", str(count - 3))
        caption = caption_of(texts, "holov-official")
        real = sorted(int(position) for position in kept if 0 <= position < count)
        zeros = int((kept < 0).sum())
        said = f", {zeros} zero rows" if zeros else ""
        assert caption == f"holov-official: {len(real)} of {count}{said}, and the word before the picture"
        assert lit_of(drawn, texts, subject, caption) == real
        assert count - 1 in real

    def test_crops_of_the_published_code(self, qwen_bundle: Bundle, photo: Path) -> None:
        """They divide the word before the picture and all tokens but the last, which has none; in output order."""
        subject = subject_from_picture(photo, qwen_bundle.manifest.plan.model, 480)
        count = subject.tokens
        (panel,) = panels_from_bundle(qwen_bundle, _on_the_cpu, subject.pixels, count // 3, ["holov-official"])
        assert panel.crops is not None
        crops = int(1024 / 576 * count / (count // 3 - 1))
        word, *sizes = (len(part) for part in np.array_split(np.arange(count), crops))
        assert np.bincount(panel.crops[:-1]).tolist() == [word - 1, *sizes]
        assert panel.crops[-1] == -1
        order = panel.crops[panel.positions]
        assert order[:-1].tolist() == sorted(order[:-1])
        assert panel.positions[-1] == count - 1

    def test_rules_decide_alike_with_and_without_a_graph(
        self, qwen_bundle: Bundle, next_bundle: Bundle, photo: Path, tmp_path: Path
    ) -> None:
        """A bundle that held the rule, and the same one that did not."""
        for bundle, method in ((qwen_bundle, "holov"), (qwen_bundle, "holov-official")):
            held = shown(tmp_path / "held.png", bundle, str(photo), "--methods", method)
            other = next(name for name in bundle.methods if name != method)
            alone = Bundle(bundle.folder, bundle.manifest, tuple(g for g in bundle.graphs if g.name == other))
            drawn = _drawn_without(alone.of_method(other), photo, method)
            assert np.array_equal(np.asarray(held), np.asarray(drawn)), method

    def test_squares_of_a_model_with_clips(
        self, video_bundle: Bundle, photo: Path, tmp_path: Path, texts: Texts
    ) -> None:
        drawn = shown(tmp_path / "kept.png", video_bundle, str(photo), "--budget", "50", "--methods", "holov")
        subject = subject_from_picture(photo, video_bundle.manifest.plan.model, 480)
        assert lit_of(drawn, texts, subject, "holov: 16 of 16") == list(range(16)), "a clip has more, a picture all"


def _drawn_without(bundle: Bundle, photo: Path, method: str) -> Image.Image:
    """The picture of a rule that has no graph in the bundle."""
    assert method not in bundle.methods
    subject = subject_from_picture(photo, bundle.manifest.plan.model, 480)
    return picture_of_panels(subject, panels_from_bundle(bundle, _on_the_cpu, subject.pixels, None, [method]))


def _on_the_cpu(view: Bundle) -> Runner:
    return runner_from_bundle(view, provider="cpu")


class TestClips:
    @pytest.mark.parametrize("spread", ["frames", "clip"])
    def test_frames(self, video_bundle: Bundle, frames: Path, spread: str, tmp_path: Path, texts: Texts) -> None:
        subject = subject_from_clip(frames, video_bundle.manifest.plan.model, 160)
        assert [view.region.frame for view in subject.views] == [0, 2, 5, 7, 10, 12, 15, 17]
        arguments = ["--video", str(frames), "--spread", spread, "--budget", "29", "--methods", "holov,cls-topk"]
        drawn = shown(tmp_path / "kept.png", video_bundle, *arguments)
        with Session.open(video_bundle, decoder="none", provider="cpu") as session:
            seen = session.see(videos=[frames], budget=29, spread=spread)  # type: ignore[arg-type]
            whole = session.see(videos=[frames], budget=29, spread="clip").saliency
        assert whole is not None
        of_frame = np.split(whole[0], 8)
        if spread == "clip":
            most = np.argsort(-whole[0], kind="stable")[:29]
        else:
            share = [(number + 1) * 29 // 8 - number * 29 // 8 for number in range(8)]
            parts = [np.argsort(-one, kind="stable")[:few] for one, few in zip(of_frame, share, strict=True)]
            most = np.concatenate([17 * number + part for number, part in enumerate(parts)])
        said = {"frames": "shared equally by the frames", "clip": "wherever in the clip"}[spread]
        assert texts.captions[0] == "what the tower sees: 136 tokens in 8 frames"
        for method, kept in (("holov", seen.positions[0]), ("cls-topk", most)):
            caption = f"{method}: 29 of 136, {said}"
            patches = sorted(int(position) for position in kept if position % 17)
            assert lit_of(drawn, texts, subject, caption) == patches
            counts = np.bincount(kept // 17, minlength=8)
            cls = [", with CLS" if 17 * number in kept else "" for number in range(8)]
            names = [f"frame {view.region.frame}" for view in subject.views]
            expected = [f"{name}: {count} of 17{end}" for name, count, end in zip(names, counts, cls, strict=True)]
            assert [item.text for item in texts.below(caption)] == expected

    def test_frames_that_get_none(self, video_bundle: Bundle, frames: Path, tmp_path: Path, texts: Texts) -> None:
        """Five tokens for eight frames; the other rule's saliency comes from all of them."""
        methods = "holov,holov-official,cls-topk"
        shown(tmp_path / "kept.png", video_bundle, "--video", str(frames), "--budget", "5", "--methods", methods)
        for method in ("holov", "cls-topk"):
            found = texts.below(f"{method}: 5 of 136, shared equally by the frames")
            counts = [item.text.split(": ")[1].split(",")[0] for item in found]
            assert counts == [f"{count} of 17" for count in (0, 1, 0, 1, 1, 0, 1, 1)]
        assert "wherever in the clip" in caption_of(texts, "holov-official"), "it never shares a quota out"

    def test_pairs_of_frames(self, qwen_bundle: Bundle, frames: Path, tmp_path: Path, texts: Texts) -> None:
        subject = subject_from_clip(frames, qwen_bundle.manifest.plan.model, 160)
        methods = "holov,holov-official"
        drawn = shown(
            tmp_path / "kept.png", qwen_bundle, "--video", str(frames), "--budget", "40", "--methods", methods
        )
        count = subject.tokens
        assert texts.captions[0] == f"what the tower sees: {count} tokens in {len(subject.views)} pairs"
        for method in ("holov", "holov-official"):
            with Session.open(qwen_bundle, method=method, decoder="none", provider="cpu") as session:
                kept = session.see(videos=[frames], budget=40).positions[0]
            real = sorted(int(position) for position in kept if 0 <= position < count)
            assert lit_of(drawn, texts, subject, caption_of(texts, method)) == real
        first = texts.below(caption_of(texts, "holov"))[1].text
        assert first.startswith(f"pair from frame {subject.views[1].region.frame}: ")
        word = "and the word before the clip" in caption_of(texts, "holov-official")
        assert word == bool((kept == count).any())

    def test_a_picture_is_a_clip_of_one_frame(
        self, qwen_bundle: Bundle, photo: Path, tmp_path: Path, texts: Texts
    ) -> None:
        shown(tmp_path / "kept.png", qwen_bundle, "--video", str(photo))
        assert texts.captions[0].endswith("in 1 pair")
        assert texts.captions[1].startswith("pair from frame 0: ")

    def test_the_side_is_that_of_a_panel(self, qwen_bundle: Bundle, frames: Path, tmp_path: Path) -> None:
        widths = []
        for side in ("600", "900"):
            arguments = ["--video", str(frames), "--side", side, "--methods", "cls-topk"]
            widths.append(shown(tmp_path / "kept.png", qwen_bundle, *arguments).width)
        columns = round((widths[1] - widths[0]) / 100)
        assert widths[0] == columns * 200 + (columns - 1) * 12


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["PHOTO", "--video", "FRAMES"], "name one thing to look at"),
            ([], "name one thing to look at"),
            (["PHOTO", "--spread", "clip"], "--spread is for --video only"),
            (["--video", "FRAMES", "--spread", "both"], "both"),
            (["--video", "missing.mp4"], "missing.mp4' does not exist"),
            (["--video", "TEXT"], "notes.txt"),
            (["--video", "EMPTY"], "holds no pictures"),
            (["TEXT"], "notes.txt"),
            (["FRAMES"], "frames"),
            (["--video", "FRAMES", "--budget", "289"], "1..288"),
            (["PHOTO", "--budget", "0"], "1..288"),
        ],
    )
    def test_before_files_are_hashed(
        self,
        qwen_bundle: Bundle,
        photo: Path,
        frames: Path,
        tmp_path: Path,
        arguments: list[str],
        words: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Capture,
    ) -> None:
        monkeypatch.setattr("holov_export.cli.ask.open_bundle", lambda *given, **settings: pytest.fail("it was opened"))
        (tmp_path / "notes.txt").write_text("no picture")
        (tmp_path / "empty").mkdir()
        paths = {"PHOTO": photo, "FRAMES": frames, "TEXT": tmp_path / "notes.txt", "EMPTY": tmp_path / "empty"}
        given = [str(paths.get(item, item)) for item in arguments]
        assert qwen_bundle.manifest.plan.tokens == 288
        assert run(["show", str(qwen_bundle.folder), *given, "-o", str(tmp_path / "kept.png")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "kept.png").exists()

    def test_a_clip_for_a_model_that_takes_none(
        self, next_bundle: Bundle, toy_bundle: Bundle, frames: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        for bundle in (next_bundle, toy_bundle):
            assert run(["show", str(bundle.folder), "--video", str(frames), "-o", str(tmp_path / "kept.png")]) == 2
            error = capsys.readouterr().err
            assert f"'{read_manifest(bundle.folder).plan.model.name}' takes no videos" in error

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("divprune", "reads features that this bundle does not give"),
            ("holov-paper", "cannot decide where pictures have unequal numbers of tokens"),
            ("visionzip", "cannot decide where pictures have unequal numbers of tokens"),
        ],
    )
    def test_rules_that_cannot_decide_here(
        self,
        next_bundle: Bundle,
        photo: Path,
        tmp_path: Path,
        method: str,
        words: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Capture,
    ) -> None:
        monkeypatch.setattr(
            "holov_export.cli.ask.runner_from_bundle", lambda *given, **named: pytest.fail("a graph ran")
        )
        arguments = ["--methods", f"holov,{method}", "-o", str(tmp_path / "kept.png")]
        assert run(["show", str(next_bundle.folder), str(photo), *arguments]) == 2
        assert words in capsys.readouterr().err
