"""The numbers that Prometheus reads are those that the worker told."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from holov_export.serve.metrics import BuildFacts, Load, PrometheusMetrics, Stages, Unobserved


def samples(metrics: PrometheusMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_every_event_is_counted() -> None:
    metrics = PrometheusMetrics(BuildFacts(version="1", model="tiny", method="holov", engine="onnxruntime"))
    metrics.accepted()
    metrics.accepted()
    metrics.rejected("full")
    metrics.load(Load(queued=3, seeing=2, decoding=1, budget=64))
    metrics.saw(images=2, kept=[64, 16], pruned=[512, 560], preprocess=0.003, vision=0.04)
    metrics.first_token(ttft=0.12, budget=64)
    metrics.first_token(ttft=0.02, budget=None)
    stages = Stages(queue=0.01, stitch=0.001, setup=0.0, prefill=0.03, decode=0.2)
    metrics.ended("finished", total=0.4, prompt_tokens=80, new_tokens=12, stages=stages)
    metrics.ended("cancelled", total=9.0, prompt_tokens=0, new_tokens=0, stages=Stages(queue=0.5))
    metrics.responded("/v1/chat/completions", 200)
    found = samples(metrics)

    def value(name: str, **labels: str) -> float:
        return found[f"holov_{name}", tuple(sorted(labels.items()))]

    assert value("accepted_total") == 2
    assert value("rejected_total", reason="full") == 1
    assert value("rejected_total", reason="closing") == 0
    assert value("requests_total", outcome="finished") == 1
    assert value("requests_total", outcome="cancelled") == 1
    assert value("requests_total", outcome="late") == 0
    assert [value("jobs", stage=stage) for stage in ("queued", "seeing", "decoding")] == [3, 2, 1]
    assert value("budget_tokens") == 64
    assert value("visual_tokens_total", fate="kept") == 80
    assert value("visual_tokens_total", fate="pruned") == 1072
    assert value("tokens_total", kind="prompt") == 80
    assert value("tokens_total", kind="answer") == 12
    assert value("vision_batch_images_bucket", le="1.0") == 0
    assert value("vision_batch_images_bucket", le="2.0") == 1
    assert value("ttft_seconds_bucket", le="0.025") == 1
    assert value("ttft_seconds_bucket", le="0.15") == 2
    assert value("chosen_budget_tokens_count") == 1, "a job without images has no budget"
    assert value("answer_seconds_count") == 1, "only finished answers have a whole time"
    assert value("stage_seconds_count", stage="queue") == 2
    assert value("stage_seconds_count", stage="prefill") == 1
    assert value("stage_seconds_sum", stage="vision") == 0.04
    assert value("http_responses_total", route="/v1/chat/completions", status="200") == 1
    assert value("build_info", version="1", model="tiny", method="holov", engine="onnxruntime") == 1


def test_two_servers_in_a_process_do_not_share_numbers() -> None:
    one, other = PrometheusMetrics(), PrometheusMetrics()
    one.accepted()
    assert samples(one)["holov_accepted_total", ()] == 1
    assert samples(other)["holov_accepted_total", ()] == 0
    assert not any(name == "holov_build_info" for name, _ in samples(one))


def test_metrics_say_their_content_type() -> None:
    assert PrometheusMetrics().content_type.startswith("text/plain")


def test_an_observer_that_forgets() -> None:
    observer = Unobserved()
    observer.accepted()
    observer.ended("finished", total=1.0, prompt_tokens=1, new_tokens=1, stages=Stages())
    assert vars(observer) == {}
