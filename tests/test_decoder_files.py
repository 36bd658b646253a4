"""Decoders beside the manifest: read, compared with their record, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holov_export.bundle import Bundle
from holov_export.decoder_files import (
    RECORD,
    DecoderRecord,
    DecoderSizes,
    atomic_decoder_folder,
    decoder_folder,
    decoders_in,
    files_in,
    read_decoder,
    verify_decoder,
    write_record,
)
from holov_export.errors import BundleError, IntegrityError, UsageError
from holov_export.runtime.decoder_choice import DecoderOptions, decoder_maker
from holov_export.spec import DecoderSpec

SIZES = DecoderSizes(batch=2, images=1, budget=64, multimodal=128, input=512, sequence=640)


def written(bundle: Path, *, width: int = 48, vocab_size: int = 100, kind: str = "llamacpp") -> Path:
    folder = decoder_folder(bundle, kind)
    with atomic_decoder_folder(folder) as work:
        (work / "engine").mkdir()
        (work / "language.gguf").write_bytes(b"weights")
        (work / "engine" / "config.json").write_text("{}", encoding="utf-8")
        record = DecoderRecord(
            kind=kind,
            model="tiny",
            width=width,
            vocab_size=vocab_size,
            weights="f16",
            main="language.gguf",
            sizes=SIZES,
            commands=(("a", "b c"),),
            files=files_in(work),
            tool="test 1",
            created="2026-01-01T00:00:00+00:00",
        )
        write_record(work, record)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path)
    decoder = read_decoder(folder, "llamacpp")
    assert decoder.main == folder / "language.gguf"
    assert [item.path for item in decoder.record.files] == ["engine/config.json", "language.gguf"]
    assert decoder.record.sizes == SIZES
    verify_decoder(decoder)
    assert [found.record.kind for found in decoders_in(tmp_path)] == ["llamacpp"]


def killed(folder: Path) -> None:
    with atomic_decoder_folder(folder) as work:
        (work / "language.gguf").write_bytes(b"half")
        raise KeyboardInterrupt


def test_a_new_one_replaces_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    folder = written(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        killed(folder)
    verify_decoder(read_decoder(folder, "llamacpp"))
    assert read_decoder(written(tmp_path, width=49), "llamacpp").record.width == 49


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: (folder / "language.gguf").write_bytes(b"weight"), "missing or cut off"),
        (lambda folder: (folder / "language.gguf").write_bytes(b"WEIGHTS"), "was changed"),
        (lambda folder: (folder / "engine" / "config.json").unlink(), "missing or cut off"),
    ],
)
def test_a_changed_file_is_found(tmp_path: Path, change: object, why: str) -> None:
    folder = written(tmp_path)
    assert callable(change)
    change(folder)
    with pytest.raises(IntegrityError, match=why):
        verify_decoder(read_decoder(folder, "llamacpp"))


def test_sizes_alone_do_not_see_a_changed_byte(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "language.gguf").write_bytes(b"WEIGHTS")
    verify_decoder(read_decoder(folder, "llamacpp"), full=False)


def test_a_record_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record["files"][0]["path"] = "../../secret"
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(IntegrityError, match="outside"):
        verify_decoder(read_decoder(folder, "llamacpp"))


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        (None, BundleError, "holds no llamacpp decoder"),
        ("{", IntegrityError, "does not parse"),
        ('{"schema_version": 9}', BundleError, "has schema 9"),
        ('{"schema_version": 1}', IntegrityError, "does not parse: kind"),
    ],
)
def test_records_that_are_none(tmp_path: Path, text: str | None, error: type[Exception], why: str) -> None:
    if text is not None:
        (tmp_path / RECORD).write_text(text, encoding="utf-8")
    with pytest.raises(error, match=why):
        read_decoder(tmp_path, "llamacpp")


def test_one_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="for trtllm, not for llamacpp"):
        read_decoder(written(tmp_path, kind="trtllm"), "llamacpp")


class TestChoice:
    """What `decoder_maker` refuses before anything is loaded."""

    def test_none_there(self, toy_bundle: Bundle) -> None:
        for kind in ("llamacpp", "trtllm"):
            with pytest.raises(BundleError, match=f"holds no {kind} decoder") as caught:
                decoder_maker(kind, toy_bundle, DecoderOptions())
            assert f"compile BUNDLE --decoder {kind}" in caught.value.hint

    def test_of_another_model(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        spec: DecoderSpec = toy_bundle.manifest.plan.model.decoder
        folder = written(tmp_path, width=spec.width + 1, vocab_size=spec.vocab_size)
        with pytest.raises(BundleError, match="of another model: width"):
            decoder_maker("llamacpp", toy_bundle, DecoderOptions(folder=folder))
        good = written(tmp_path, width=spec.width, vocab_size=spec.vocab_size)
        decoder_maker("llamacpp", toy_bundle, DecoderOptions(folder=good))

    def test_changed(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        spec = toy_bundle.manifest.plan.model.decoder
        folder = written(tmp_path, width=spec.width, vocab_size=spec.vocab_size)
        (folder / "language.gguf").write_bytes(b"WEIGHTS")
        with pytest.raises(IntegrityError, match="was changed"):
            decoder_maker("llamacpp", toy_bundle, DecoderOptions(folder=folder))

    @pytest.mark.parametrize(
        ("name", "why"),
        [("hf", "needs the checkpoint"), ("vllm", "needs the checkpoint"), ("trtllm-api", "needs the checkpoint"),
         ("vllm-server", "where it listens")],
    )  # fmt: skip
    def test_an_option_is_missing(self, toy_bundle: Bundle, name: str, why: str) -> None:
        with pytest.raises(UsageError, match=why):
            decoder_maker(name, toy_bundle, DecoderOptions())
