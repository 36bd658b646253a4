"""`holov-export triton`: a model repository for a Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from holov_export.bundle import open_bundle
from holov_export.cli.console import OUT, print_json, say, table
from holov_export.cli.decoder_options import (
    check_decoder_options,
    check_engine_options,
    decoder_options,
    decoder_settings,
)
from holov_export.cli.options import (
    UserPath,
    bundle_argument,
    engine_option,
    engine_target_option,
    graph_of,
    json_option,
    method_option,
    provider_option,
    verify_option,
)
from holov_export.serve.triton.repository import LAYOUTS, Layout, RepositoryRequest, write_repository
from holov_export.serve.triton.settings import ModelSettings

_WHAT = {
    "holov_vision": "image files, budget -> visual tokens; requests run together",
    "holov_prompt": "question, visual tokens -> ids and rows",
    "holov_decoder": "ids and rows -> text, token by token",
    "holov_answer": "image files, question, budget -> text, token by token",
    "holov_answer_once": "the same in one response, for HTTP",
    "multimodal_encoders": "takes the place of the one of TensorRT-LLM's pipeline",
    "holov_vision_graph": "pixels, budget, quota -> visual tokens, by Triton's own back end",
}


@click.command("triton")
@bundle_argument
@click.option("-o", "--output", type=UserPath(), required=True, help="The model repository.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="holov",
    show_default=True,
    help="holov: models that answer. multimodal_ifb: the encoder of TensorRT-LLM's pipeline (up to 1.2). onnxruntime, "
    "tensorrt: the graph alone, pixels in.",
)
@decoder_options
@engine_option
@engine_target_option
@provider_option
@method_option
@verify_option
@click.option("--max-batch", type=click.IntRange(1), default=8, show_default=True, help="Requests of one vision run.")
@click.option("--instances", type=click.IntRange(1), default=1, show_default=True, help="Of the vision model.")
@click.option("--gpu", is_flag=True, help="Vision and decoder are instances of the first GPU (KIND_GPU).")
@click.option("--threads", type=click.IntRange(1), help="CPU threads within one operator.")
@click.option("--site", type=UserPath(), help="site-packages of the models, where the stub does not find them itself.")
@click.option("--copy-bundle", is_flag=True, help="Copy the bundle into the repository instead of naming its path.")
@click.option("--budget", type=click.IntRange(1), help="multimodal_ifb: rows of every image [default: the bundle's].")
@click.option("--gpt-model-path", help="multimodal_ifb: folder of the language engine; its sizes are compared.")
@click.option("--max-num-images", type=click.IntRange(1), help="multimodal_ifb: as preprocessing has it.")
@click.option("--overwrite", is_flag=True, help="Replace a repository that this command has written.")
@json_option
def triton_command(
    bundle: Path,
    output: Path,
    layout: Layout,
    decoder: str,
    checkpoint: str | None,
    decoder_folder: Path | None,
    decoder_url: str | None,
    tensor_parallel: int,
    engine: str,
    target: str | None,
    provider: str,
    method: str | None,
    verify: str,
    max_batch: int,
    instances: int,
    gpu: bool,
    threads: int | None,
    site: Path | None,
    copy_bundle: bool,
    budget: int | None,
    gpt_model_path: str | None,
    max_num_images: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a model repository for a Triton Inference Server."""
    choice = (decoder, checkpoint, decoder_folder, decoder_url, tensor_parallel)
    check_decoder_options(*choice)
    if layout != "tensorrt":
        check_engine_options(engine, target)
    opened = graph_of(open_bundle(bundle, verify="full" if verify == "full" else "size"), method)
    options = decoder_settings(opened, *choice)
    settings = ModelSettings(
        bundle=str(opened.folder),
        method=method,
        engine=engine,
        target=target,
        provider=provider,
        threads=threads,
        decoder=decoder,
        checkpoint=None if options.checkpoint is None else str(options.checkpoint.absolute()),
        decoder_folder=None if options.folder is None else str(options.folder.absolute()),
        decoder_url=options.url,
        tensor_parallel=tensor_parallel,
    )
    request = RepositoryRequest(
        settings=settings,
        layout=layout,
        batch=max_batch,
        instances=instances,
        gpu=gpu,
        site=site,
        copy_bundle=copy_bundle,
        budget=budget,
        gpt_model_path=gpt_model_path,
        max_num_images=max_num_images,
        overwrite=overwrite,
    )
    record = write_repository(opened, request, output)
    if as_json:
        print_json({**record.model_dump(), "output": str(output.absolute())})
        return
    rows = table("model", "what it does")
    for name in record.models:
        rows.add_row(name, _WHAT[name])
    OUT.print(rows)
    say(f"written to {output}; start it with: tritonserver --model-repository={output.absolute()}")
