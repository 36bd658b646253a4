"""The decoders that can answer from a bundle, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holov_export.bundle import Bundle
from holov_export.decoder_files import DecoderKind, decoder_folder, read_decoder, verify_decoder
from holov_export.errors import BundleError, UnknownNameError, UsageError
from holov_export.extras import is_installed
from holov_export.runtime.decoder import Decoder, check_genai
from holov_export.runtime.decoder_kv_cache import KvCache, kv_cache_name
from holov_export.spec import DecoderSpec

#: decoders by name; "auto" is what suits the bundle, "none" cannot answer, but a session without one still sees
DECODERS = (
    *("auto", "genai", "ort", "hf"),
    *("llamacpp", "vllm", "vllm-server", "trtllm", "trtllm-api"),
    "none",
)
#: those that load the checkpoint itself
OF_CHECKPOINT = ("hf", "vllm", "trtllm-api")


@dataclass(frozen=True)
class DecoderOptions:
    """What a decoder is loaded with; each reads what concerns it.

    Attributes:
        provider: "cpu", "cuda" or "auto".
        threads: CPU threads within one operator; None for the back end's choice.
        checkpoint: directory of the checkpoint, for those of `OF_CHECKPOINT`.
        folder: "llamacpp", "trtllm": where the decoder lies, instead of in the bundle.
        url, api_key: "vllm-server": where it listens, "http://127.0.0.1:8000", and its key.
        batch: "genai": prompts that begin together are decoded together, up to so many.
        tensor_parallel: "vllm", "trtllm-api": over how many GPUs the model is spread.
        verify: "llamacpp", "trtllm": "full" checks every file's sha256, "size" only sizes.
        kv_cache: "llamacpp", "vllm", "trtllm-api": what keys and values are stored in; "auto" is the back end's choice.
    """

    provider: str = "auto"
    threads: int | None = None
    checkpoint: Path | None = None
    folder: Path | None = None
    url: str | None = None
    api_key: str | None = None
    tensor_parallel: int = 1
    batch: int = 1
    verify: Literal["full", "size"] = "full"
    kv_cache: KvCache = "auto"


def decoder_maker(decoder: str | Decoder, bundle: Bundle, options: DecoderOptions) -> Callable[[], Decoder]:
    """What loads the decoder. The choice is checked now; loading waits for the first answer.

    Args:
        decoder: one of `DECODERS`, or a decoder that exists already.
        bundle: an opened bundle.

    Raises:
        UnknownNameError: no such decoder.
        UsageError: an option that the decoder needs is missing, or "genai" for a language model that it would run
            wrongly, or a type of keys and values that it has not.
        BundleError, IntegrityError: the bundle has no such decoder, or it was changed.
    """
    if not isinstance(decoder, str):
        return lambda: decoder
    if decoder not in DECODERS:
        raise UnknownNameError(f"unknown decoder '{decoder}'.", hint=f"Known: {', '.join(DECODERS)}.")
    kv_cache_name(decoder, options.kv_cache)
    spec = bundle.manifest.plan.model.decoder
    if decoder in OF_CHECKPOINT:
        return _of_checkpoint(decoder, spec, options)
    if decoder == "llamacpp":
        return _llamacpp(bundle, spec, options)
    if decoder == "trtllm":
        return _trtllm(bundle, spec, options)
    if decoder == "vllm-server":
        return _vllm_server(spec, options)
    return _embedded(decoder, bundle, spec, options)


def embedded_decoder(decoder: str, spec: DecoderSpec) -> str:
    """Which back end runs the decoder of a bundle: "genai" or "ort".

    Args:
        decoder: "auto", "genai" or "ort".
        spec: of the language model.

    Raises:
        UsageError: "genai" for a language model that it would run wrongly.
    """
    if decoder == "auto":
        # GenAI has no wheel for Python 3.10 on ARM; plain ONNX Runtime runs the same graphs
        return "genai" if not spec.mrope_sections and is_installed("onnxruntime_genai") else "ort"
    if decoder == "genai":
        check_genai(spec)
    return decoder


def _embedded(decoder: str, bundle: Bundle, spec: DecoderSpec, options: DecoderOptions) -> Callable[[], Decoder]:
    engine = embedded_decoder(decoder, spec)

    def embedded() -> Decoder:
        from holov_export.runtime.decoder_genai import GenaiDecoder
        from holov_export.runtime.decoder_ort import OrtDecoder

        if decoder == "none":
            raise UsageError("this session was opened without a decoder.", hint="Choose --decoder auto or hf.")
        if bundle.decoder is None:
            raise BundleError(
                f"the bundle '{bundle.folder.name}' was exported without a decoder.",
                hint="Export it without --no-decoder, or ask with --decoder hf --checkpoint DIR.",
            )
        if engine == "ort":
            return OrtDecoder(bundle.decoder, spec, provider=options.provider, threads=options.threads)
        return GenaiDecoder(
            bundle.decoder, spec, provider=options.provider, threads=options.threads, batch=options.batch
        )

    return embedded


def _of_checkpoint(decoder: str, spec: DecoderSpec, options: DecoderOptions) -> Callable[[], Decoder]:
    if options.checkpoint is None:
        raise UsageError(f"the decoder '{decoder}' needs the checkpoint.", hint="Add --checkpoint DIR.")
    folder = options.checkpoint

    def made() -> Decoder:
        if decoder == "hf":
            from holov_export.runtime.decoder_hf import HfDecoder

            return HfDecoder(folder, spec, provider=options.provider, threads=options.threads)
        if decoder == "vllm":
            from holov_export.runtime.decoder_vllm import VllmDecoder

            return VllmDecoder(
                folder,
                spec,
                provider=options.provider,
                tensor_parallel=options.tensor_parallel,
                kv_cache=options.kv_cache,
            )
        from holov_export.runtime.decoder_trtllm_api import TrtllmApiDecoder

        return TrtllmApiDecoder(folder, spec, tensor_parallel=options.tensor_parallel, kv_cache=options.kv_cache)

    return made


def _beside_the_manifest(kind: DecoderKind, bundle: Bundle, options: DecoderOptions) -> Path:
    """The folder of a decoder that was made for another runtime, compared with its record and with the bundle."""
    decoder = read_decoder(options.folder or decoder_folder(bundle.folder, kind), kind)
    verify_decoder(decoder, full=options.verify == "full")
    spec, record = bundle.manifest.plan.model.decoder, decoder.record
    if (record.width, record.vocab_size) != (spec.width, spec.vocab_size):
        raise BundleError(
            f"the {kind} decoder is of another model: width {record.width} and {record.vocab_size} words, the bundle's "
            f"has {spec.width} and {spec.vocab_size}.",
            hint=f"Make it again: holov-export compile BUNDLE --decoder {kind} --checkpoint DIR",
        )
    return decoder.folder


def _llamacpp(bundle: Bundle, spec: DecoderSpec, options: DecoderOptions) -> Callable[[], Decoder]:
    folder = _beside_the_manifest("llamacpp", bundle, options)

    def made() -> Decoder:
        from holov_export.runtime.decoder_llamacpp import LlamaCppDecoder

        file = read_decoder(folder, "llamacpp").main
        return LlamaCppDecoder(
            file, spec, provider=options.provider, threads=options.threads, kv_cache=options.kv_cache
        )

    return made


def _trtllm(bundle: Bundle, spec: DecoderSpec, options: DecoderOptions) -> Callable[[], Decoder]:
    folder = _beside_the_manifest("trtllm", bundle, options)

    def made() -> Decoder:
        from holov_export.runtime.decoder_trtllm import TrtllmDecoder

        return TrtllmDecoder(folder, spec)

    return made


def _vllm_server(spec: DecoderSpec, options: DecoderOptions) -> Callable[[], Decoder]:
    if not options.url:
        raise UsageError("the decoder 'vllm-server' needs to know where it listens.", hint="Add --decoder-url URL.")
    url = options.url

    def made() -> Decoder:
        from holov_export.runtime.decoder_vllm_server import VllmServerDecoder

        return VllmServerDecoder(url, spec, api_key=options.api_key)

    return made
