"""The readiness check: every rule finds what it is for where it should, and our own graphs are ready."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from broken_graphs import (
    ALL,
    ASKED,
    CONTROLS,
    FLOAT,
    INT64,
    Control,
    constant,
    external,
    k_from_input,
    loop,
    model,
    node,
    topk,
    value,
)
from onnx import TensorProto, helper
from quantized_controls import QUANTIZED_CONTROLS, eight_bit_floats, float_weights, product, sound, vision

from holov_export.bundle import Bundle
from holov_export.compile.deciding_part import deciding_part
from holov_export.compile.graph_file import LARGEST_PROTOBUF, graph_path
from holov_export.compile.graph_view import view_of
from holov_export.compile.readiness import CHECKS, TOO_LARGE, VERSIONS, readiness_of, readiness_of_bundle
from holov_export.compile.readiness_rules import rule_book
from holov_export.errors import BundleError, UsageError
from holov_export.policies import POLICIES
from holov_export.spec import Precision
from holov_export.versions import version_from_text

BOOK = rule_book()
EVERY = (*CONTROLS, *QUANTIZED_CONTROLS)


def rules_found(asked: onnx.ModelProto | Path, tensorrt: str) -> set[str]:
    return {finding.rule for finding in readiness_of(asked, [tensorrt]).versions[0].findings}


# ------------------------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize("control", EVERY, ids=lambda control: f"{control.rule} {control.name}".strip())
def test_a_rule_finds_its_control_on_the_right_versions(control: Control) -> None:
    graph = control.build()
    fired = tuple(version for version in ASKED if control.rule in rules_found(graph, version))
    assert fired == control.fires


def test_every_rule_has_a_control_and_a_check() -> None:
    files = {"protobuf-too-large", "external-data-link"}  # about files, below
    patterns = {"attribute-value", "input-not-constant", "input-unsupported", "output-unsupported", "rank-unsupported"}
    rules = [rule.id for rule in BOOK.rules]
    assert len(set(rules)) == len(rules)
    assert {control.rule for control in EVERY} | files | patterns == set(rules)
    assert set(CHECKS) | {TOO_LARGE} == set(rules)


def test_a_finding_says_where_why_and_what_to_do() -> None:
    (finding,) = [item for item in readiness_of(topk(3841), ["10.3"]).of("10.3").findings if item.severity == "error"]
    assert (finding.rule, finding.node, finding.operator) == ("topk-limit", "the/TopK", "TopK")
    assert "3841" in finding.message and "3840" in finding.message
    assert finding.way_out
    assert finding.source.startswith("https://")


def test_limits_are_inclusive() -> None:
    assert "topk-limit" not in rules_found(topk(3840), "8.6")
    assert "topk-unbounded" not in rules_found(topk("budget", length=3840), "8.6")
    assert rules_found(topk(3), "11.1") == set()


def test_k_from_an_integer_input_is_a_shape_value() -> None:
    for version in ASKED:
        assert not rules_found(k_from_input(INT64, (1,)), version) & {"shape-from-data", "shape-value-size"}
        assert not rules_found(k_from_input(INT64, (8,)), version) & {"shape-from-data", "shape-value-size"}


def test_a_loop_that_keeps_to_the_rules() -> None:
    for version in ASKED:
        for graph in (loop(), loop(scans=True), loop(counts=True), loop(computed=True)):
            assert rules_found(graph, version) <= {"int64-becomes-int32"}


# ---------------------------------------------------------------------------------------------------------- patterns


def pattern_id(pattern: object) -> str:
    fields = ("operator", "name", "index", "count")
    return " ".join(str(getattr(pattern, field)) for field in fields if hasattr(pattern, field))


def node_of(operator: str, count: int, **settings: object) -> tuple[onnx.NodeProto, list[onnx.ValueInfoProto]]:
    """A node with `count` computed inputs of rank 4."""
    names = [f"in{index}" for index in range(count)]
    inputs = [value(name, FLOAT, (1, 2, 3, 4)) for name in names]
    return node(operator, names, ["y"], **settings), inputs


def fired_by(
    made: onnx.NodeProto, inputs: list[onnx.ValueInfoProto], rule: str, held: list[onnx.TensorProto]
) -> set[str]:
    """Versions where a rule speaks of the node. Of an opset that knows the node and that 8.x need not lower."""
    graph = model([made], inputs or None, constants=held, opset=17)
    return {version for version in ASKED if rule in rules_found(graph, version)}


def expected(pattern: object) -> set[str]:
    return {version for version in ASKED if pattern.applies(version_from_text(version))}  # type: ignore[attr-defined]


@pytest.mark.parametrize("pattern", BOOK.attribute, ids=pattern_id)
def test_attributes(pattern) -> None:  # type: ignore[no-untyped-def]
    for said in pattern.allowed:
        made, inputs = node_of(pattern.operator, 1, **{pattern.name: [said, said] if said == 1 else said})
        assert not fired_by(made, inputs, "attribute-value", [])
    wrong = {int: 7, float: 7.5, str: "other"}[type(pattern.allowed[0])] if pattern.allowed else None
    if pattern.name == "sparse_value":
        wrong = helper.make_sparse_tensor(constant("v", np.ones(1, np.float32)), constant("i", np.array([0])), [3])
    elif wrong is None:
        wrong = "text" if pattern.name == "value_string" else ["text"]
    inputs_count = 0 if pattern.operator == "Constant" else 1
    made, inputs = node_of(pattern.operator, inputs_count, **{pattern.name: wrong})
    assert fired_by(made, inputs, "attribute-value", []) == expected(pattern)


@pytest.mark.parametrize("pattern", BOOK.constant, ids=pattern_id)
def test_inputs_that_must_be_constant(pattern) -> None:  # type: ignore[no-untyped-def]
    made, inputs = node_of(pattern.operator, pattern.index + 1)
    assert fired_by(made, inputs, "input-not-constant", []) >= expected(pattern)
    held = [constant(item.name, np.array([0])) for item in inputs[1:]]
    assert not fired_by(made, inputs[:1], "input-not-constant", held)


def test_a_constant_may_be_computed_from_constants() -> None:
    nodes = [node("Add", ["one", "one"], ["axis"]), node("CumSum", ["x", "axis"], ["y"])]
    graph = model(nodes, constants=[constant("one", np.array(0))])
    assert not any("input-not-constant" in rules_found(graph, version) for version in ASKED)


@pytest.mark.parametrize("pattern", BOOK.inputs, ids=pattern_id)
def test_inputs_that_must_not_be_there(pattern) -> None:  # type: ignore[no-untyped-def]
    made, inputs = node_of(pattern.operator, pattern.count + 1)
    assert fired_by(made, inputs, "input-unsupported", []) == expected(pattern)
    made, inputs = node_of(pattern.operator, pattern.count)
    assert not fired_by(made, inputs, "input-unsupported", [])


@pytest.mark.parametrize("pattern", BOOK.outputs, ids=pattern_id)
def test_outputs_that_must_not_be_read(pattern) -> None:  # type: ignore[no-untyped-def]
    names = [f"out{index}" for index in range(pattern.count + 1)]
    made = node(pattern.operator, ["x"], names)
    for read, wanted in ((True, expected(pattern)), (False, set())):
        outputs = [value(name, shape=None) for name in (names if read else names[:1])]
        graph = model([made], outputs=outputs)
        assert {version for version in ASKED if "output-unsupported" in rules_found(graph, version)} == wanted


@pytest.mark.parametrize("pattern", BOOK.rank, ids=pattern_id)
def test_ranks(pattern) -> None:  # type: ignore[no-untyped-def]
    for rank in range(1, 7):
        made = node(pattern.operator, ["x"], ["y"])
        graph = model([made], [value("x", shape=(2,) * rank)], [value("y", shape=None)])
        fired = {version for version in ASKED if "rank-unsupported" in rules_found(graph, version)}
        assert fired == (set() if rank in pattern.allowed else expected(pattern))


# ----------------------------------------------------------------------------------------------- quantised graphs


@pytest.mark.parametrize(("build", "versions"), [(sound, ALL), (lambda: float_weights(axis=1), ALL), (vision, ALL)])
def test_sound_quantised_graphs_pass(build, versions: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    for version in versions:
        found = readiness_of(build(), [version]).versions[0].findings
        assert [item.rule for item in found if item.severity != "note"] == [], version


def test_eight_bit_floats_are_ready_from_9_on() -> None:
    for version in ASKED:
        report = readiness_of(eight_bit_floats(), [version]).versions[0]
        assert report.ready == (version_from_text(version) >= (9,)), version
        if not report.ready:
            assert {item.rule for item in report.findings if item.severity == "error"} == {"type-unsupported"}


def test_gemm_with_transposed_weights_has_its_channels_first() -> None:
    assert readiness_of(product(axis=0, operator="Gemm", transB=1)).ready
    assert readiness_of(product(axis=-1)).ready
    assert not readiness_of(product(axis=-2)).ready


def test_a_shape_says_nothing_of_the_values_that_it_is_of() -> None:
    graph = vision()
    next(node for node in graph.graph.node if node.op_type == "Shape").input[0] = "visual_tokens"
    part = deciding_part(view_of(graph), {})
    assert part.products == {"the/key"}
    assert {"the/counts", "the/softmax", "the/top"} <= set(part.nodes)


def test_the_cpu_s_form_is_named_once_and_has_a_way_out() -> None:
    build = next(control.build for control in QUANTIZED_CONTROLS if control.rule == "quantized-for-cpu")
    (finding,) = [item for item in readiness_of(build(), ["10.3"]).versions[0].findings if item.severity == "error"]
    assert finding.rule == "quantized-for-cpu"
    assert "--int8" in finding.way_out


def test_float16_scales_have_no_way_to_tensorrt_8() -> None:
    held = {"scale": np.float16(0.1), "scales": np.full(3, 0.1, np.float16)}
    graph = product(held=held, opset=19)
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    graph.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    report = readiness_of(graph, ["8.6", "10.3"])
    assert [version.ready for version in report.versions] == [False, True]
    (finding,) = [item for item in report.of("8.6").findings if item.severity == "error"]
    assert finding.rule == "cannot-lower"
    assert "float16" in finding.message
    assert "--int8 and without --fp16" in finding.way_out


# --------------------------------------------------------------------------------------------------------- the data


def test_every_fact_has_a_source() -> None:
    for rule in BOOK.rules:
        assert all(source.startswith("https://") for source in rule.sources), rule.id
        assert rule.message.endswith((".", "{reason}")) and rule.way_out
    lists = (BOOK.attribute, BOOK.constant, BOOK.inputs, BOOK.outputs, BOOK.rank, BOOK.form, BOOK.integer)
    for pattern in (item for patterns in lists for item in patterns):
        assert pattern.source.startswith("https://"), pattern


def test_the_operator_table_is_about_real_operators() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    older = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # operators of ONNX 0.x that the parser still reads
    assert set(BOOK.operators) - known == older
    assert not set(BOOK.never) & set(BOOK.operators)
    words = {"FP32", "FP16", "BF16", "FP8", "FP4", "INT4", "INT8", "UINT8", "INT32", "INT64", "BOOL"}
    for table in (BOOK.operators, BOOK.also):
        for rows in table.values():
            assert set(" ".join(rows.values()).split()) <= words
    for operator in ("If", "Loop", "Scan", "LayerNormalization"):
        assert BOOK.first_with(operator)


@pytest.mark.parametrize(
    ("operator", "tensorrt", "types"),
    [
        ("TopK", (8, 5), {"FP32", "FP16"}),
        ("TopK", (8, 6), {"FP32", "FP16", "INT32"}),
        ("TopK", (10, 3), {"FP32", "FP16", "BF16", "INT32", "INT64"}),
        ("LayerNormalization", (8, 5), set()),
        ("LayerNormalization", (8, 6), {"FP32", "FP16"}),
        ("Clip", (8, 6), {"FP32", "FP16", "INT8", "INT32"}),
        ("Pow", (10, 3), {"FP32", "FP16", "BF16"}),
        ("Attention", (10, 13), set()),
        ("Attention", (11, 1), {"FP32", "FP16", "BF16", "INT8", "FP8"}),
        ("Unique", (11, 1), set()),
    ],
)
def test_types_in_force(operator: str, tensorrt: tuple[int, ...], types: set[str]) -> None:
    assert BOOK.types_of(operator, tensorrt) == types


# ---------------------------------------------------------------------------------------------------------- our graphs


READY = [
    pytest.param(
        method,
        precision,
        id=f"{method}-{precision.value}",
        marks=[] if method == "holov" else pytest.mark.slow,
    )
    for method in POLICIES
    for precision in (Precision.FP32, Precision.FP16)
]


@pytest.mark.parametrize(("method", "precision"), READY)
def test_our_graphs_are_ready_everywhere(exported_graph, method: str, precision: Precision) -> None:  # type: ignore[no-untyped-def]
    report = readiness_of_bundle(exported_graph(method, precision), [*VERSIONS, *ASKED])
    found = [
        (version.tensorrt, item.rule, item.node)
        for version in report.versions
        for item in version.findings
        if item.severity != "note"
    ]
    assert found == []
    assert report.ready
    assert [version.lowered_to for version in report.versions[:5]] == [17, 17, None, None, None]
    assert report.opset == 18


@pytest.mark.slow
@pytest.mark.parametrize("method", POLICIES)
def test_bfloat16_is_ready_from_9_on(exported_graph, method: str) -> None:  # type: ignore[no-untyped-def]
    report = readiness_of_bundle(exported_graph(method, Precision.BF16))
    assert [version.ready for version in report.versions] == [False, False, True, True, True]
    for tensorrt in ("8.5", "8.6"):
        assert {item.rule for item in report.of(tensorrt).findings if item.severity == "error"} == {"type-unsupported"}


def test_a_bundle_and_the_graphs_of_exporters_before_its_manifest(exported_bundle: Bundle, tmp_path: Path) -> None:
    report = readiness_of_bundle(exported_bundle.folder)
    assert report.ready
    assert report.graph == "llava-vision-holov"
    assert graph_path(exported_bundle.folder) == exported_bundle.vision
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "vision.onnx").write_bytes(exported_bundle.vision.read_bytes())
    assert readiness_of_bundle(tmp_path / "work") == report  # neither manifest nor weights are needed
    with pytest.raises(BundleError):
        readiness_of_bundle(tmp_path)
    with pytest.raises(UsageError, match="not asked"):
        report.of("10.7")


def test_a_large_graph_is_checked_in_a_second(exported_graph) -> None:  # type: ignore[no-untyped-def]
    """More nodes than the true model has (824): the layers of the tiny one, five times over."""
    graph = onnx.load(exported_graph("holov", Precision.FP16) / "vision.onnx", load_external_data=False)
    nodes = list(graph.graph.node)
    for copy in range(4):
        for item in nodes:
            renamed = graph.graph.node.add()
            renamed.CopyFrom(item)
            renamed.name = f"{copy}/{item.name}"
            for index, name in enumerate(item.output):
                renamed.output[index] = f"{copy}/{name}"
    assert len(graph.graph.node) > 824
    start = time.process_time()
    assert readiness_of(graph).ready
    assert time.process_time() - start < 2.0  # 0.4 s where nothing else runs


# --------------------------------------------------------------------------------------------------------------- files


def test_a_linked_weight_file(tmp_path: Path) -> None:
    (tmp_path / "true.data").write_bytes(b"0" * 36)
    (tmp_path / "weights.data").symlink_to("true.data")
    onnx.save(external("weights.data"), tmp_path / "model.onnx")
    for version in ALL:
        assert "external-data-link" in rules_found(tmp_path / "model.onnx", version)
    (tmp_path / "weights.data").unlink()
    for version in ALL:  # missing is fine: the weights are not needed
        assert "external-data-link" not in rules_found(tmp_path / "model.onnx", version)


def test_a_file_larger_than_a_protobuf(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as stream:
        stream.truncate(LARGEST_PROTOBUF + 1)  # a sparse file: nothing is written
    for version in ALL:
        assert rules_found(path, version) == {"protobuf-too-large"}
    assert not readiness_of(path).ready


@pytest.mark.parametrize("content", [b"", b"not a model\n", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04zip"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UsageError):
        readiness_of(tmp_path / "model.onnx")


def test_truncated_models(exported_graph, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    content = (exported_graph("holov", Precision.FP16) / "vision.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    for part in (10, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:part])
        with pytest.raises(UsageError):
            readiness_of(path)


@pytest.mark.parametrize("versions", [["8.4"], ["ten"], ["10.3", ""]])
def test_versions_that_are_none(versions: list[str]) -> None:
    with pytest.raises(UsageError):
        readiness_of(topk(3), versions)


# ------------------------------------------------------------------------------------------- graphs of other people


def test_a_proto_is_not_changed() -> None:
    graph = topk(3)
    graph.graph.initializer.append(constant("weight", np.zeros((100, 100), np.float32)))
    before = graph.SerializeToString()
    readiness_of(graph)
    assert graph.SerializeToString() == before


def test_long_chains_and_circles_end() -> None:
    chain = [helper.make_node("Add", [f"v{index}", "one"], [f"v{index + 1}"]) for index in range(3000)]
    nodes = [*chain, helper.make_node("Expand", ["x", "v3000"], ["y"])]
    inputs = [value("x", shape=(1,)), value("v0", INT64, (1,))]
    graph = model(nodes, inputs, constants=[constant("one", np.array([1]))])
    assert "shape-from-data" not in rules_found(graph, "10.3")
    circle = [node("Add", ["a", "b"], ["b"]), node("Reshape", ["x", "b"], ["y"]), node("Squeeze", ["y", "b"], ["z"])]
    readiness_of(model(circle))


def test_nodes_in_bodies_are_checked() -> None:
    graph = loop()
    graph.graph.node[0].attribute[0].g.node[0].op_type = "BitwiseAnd"
    findings = readiness_of(graph, ["10.3"]).versions[0].findings
    assert ("operator-unsupported", "the/Add") in [(finding.rule, finding.node) for finding in findings]


def test_empty_names_and_unknown_types() -> None:
    nodes = [helper.make_node("Resize", ["x", "", "", "size"], ["y"]), helper.make_node("If", ["c"], [])]
    graph = model(nodes, [value("x", shape=None), value("size", INT64, ("n",)), value("c", TensorProto.BOOL, ())])
    graph.graph.input[0].type.tensor_type.elem_type = 0
    graph.graph.input.append(onnx.ValueInfoProto(name="bare"))
    assert not readiness_of(graph).ready


@pytest.mark.slow
def test_the_whole_onnx_test_suite_is_checked_without_a_crash() -> None:
    """Nearly two thousand graphs, each operator in all its forms; what is lowered passes the ONNX checker."""
    from onnx.backend.test.case.node import collect_testcases

    from holov_export.compile.lowering import lowered_for

    verdicts, lowered = set(), 0
    with np.errstate(all="ignore"):
        cases = collect_testcases(None)
    for case in cases:
        report = readiness_of(case.model)
        verdicts.add(tuple(version.ready for version in report.versions))
        try:
            older = lowered_for(case.model, "8.5")
        except UsageError:
            continue
        lowered += 1
        try:
            onnx.checker.check_model(case.model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            continue  # a graph of the suite that this checker refuses itself
        onnx.checker.check_model(older, full_check=True)
    assert len(cases) > 1500
    assert lowered > 900
    assert {(True,) * 5, (False,) * 5, (False, False, True, True, True)} <= verdicts


def test_graphs_of_torch_users(tmp_path: Path) -> None:
    """A small network as torch exports it, with its weights inside the file."""
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    net, pixels = torch.nn.Sequential(*layers).eval(), (torch.zeros(1, 3, 8, 8),)
    torch.onnx.export(net, pixels, tmp_path / "net.onnx", dynamo=True, external_data=False, verbose=False)
    report = readiness_of(tmp_path / "net.onnx")
    assert report.ready
    assert report.nodes >= 4
