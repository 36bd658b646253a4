"""Each selection rule as an ONNX graph of its own, in ONNX Runtime, against the loops of `selection/reference`.

Where the last bit of a float32 sum decides, two right implementations differ: such inputs are left out of the
comparison of sets, and counted. The greedy rules' steps are checked on all inputs instead: each step must take a token
whose score is the best one up to rounding, given what the graph itself has taken so far. On inputs whose products are
exact nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from graphs import FORBIDDEN, bodies, shape_values, sources_of
from onnx import TensorProto, helper
from PIL import Image
from selection.cases import Floats, Grid, Wide, features_of, hangs_on_rounding, realistic, similarities
from skimage import data

from holov_export.assets import data_folder
from holov_export.compile.readiness import readiness_of
from holov_export.export.checkpoint import spec_from_checkpoint
from holov_export.export.rule_graph import RuleAlone, StepsAlone, onnx_from_rule
from holov_export.policies import (
    POLICIES,
    FeatureSource,
    HolovPolicy,
    ScopePolicy,
    SelectionPolicy,
    policy_from_settings,
)
from holov_export.runtime.preprocess import pixels_from_images
from holov_export.selection.reference import (
    DPP_FLOOR,
    divprune_order,
    dpp_order,
    merged_of,
    positions_of,
    scope_order,
)
from holov_export.spec import OPSETS, Precision
from holov_export.vision.clip import vision_from_checkpoint
from holov_export.vision.weights import SafetensorsReader

METHODS = [method for method in POLICIES if method not in ("uniform", "random")]
GREEDY = ["scope", "divprune", "cdpruner-unconditional"]
#: N -> (grid, width of the features)
SIZES: dict[int, tuple[Grid, int]] = {16: ((4, 4), 12), 144: ((12, 12), 128), 576: ((24, 24), 64), 2880: ((60, 48), 64)}
OPSET = OPSETS[Precision.FP32]


@dataclass(frozen=True)
class Graph:
    """An exported rule and its session."""

    policy: SelectionPolicy
    grid: Grid
    model: onnx.ModelProto
    session: ort.InferenceSession

    def run(self, saliency: Floats, features: Floats, quota: list[int], budget: int | None = None) -> list[np.ndarray]:
        feed = {
            "saliency": saliency,
            "features": features,
            "quota": np.array(quota, dtype=np.int64),
            "budget": np.array([budget or max(quota)], dtype=np.int64),
        }
        out: list[np.ndarray] = self.session.run(None, feed)
        return out


Export = Callable[..., Graph]


@pytest.fixture(scope="module")
def export() -> Export:
    """Exports each rule at each size once; `steps` for the state of a greedy rule."""
    made: dict[tuple[str, int, int, bool], Graph] = {}

    def exported(method: str, tokens: int, width: int | None = None, *, steps: bool = False) -> Graph:
        grid, usual = SIZES[tokens]
        key = (method, tokens, width or usual, steps)
        if key not in made:
            policy = policy_from_settings(method)
            module = StepsAlone(policy, grid) if steps else RuleAlone(policy, grid)
            model = ir.serde.serialize_model(onnx_from_rule(module, tokens, key[2], OPSET))
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            made[key] = Graph(policy, grid, model, session)
        return made[key]

    return exported


def compare(graph: Graph, saliency: Floats, features: Floats, quota: list[int], *, exact: bool = False) -> int:
    """Compare a batch with the reference; how many pictures were compared (all of them if `exact`)."""
    out, compared = graph.run(saliency, features, quota), 0
    assert out[1].tolist() == quota
    for image, asked in enumerate(quota):
        row, rows = out[0][image], features[image]
        assert (row[asked:] == -1).all()
        if not exact and hangs_on_rounding(graph.policy, saliency[image], asked, graph.grid, rows):
            continue
        compared += 1
        expected = positions_of(graph.policy, saliency[image], asked, graph.grid, rows)
        assert row[:asked].tolist() == expected.tolist()
        if graph.policy.merges:
            merged = merged_of(graph.policy, saliency[image], asked, rows)
            check_merged(out[2][image], merged, rows, exact=exact)
    return compared


def check_merged(found: np.ndarray, expected: np.ndarray, keys: Floats, *, exact: bool) -> None:
    """Equal, but for tokens whose two nearest targets are as near as float32 can tell."""
    assert ((found >= 0) == (expected >= 0)).all()
    differs = np.flatnonzero(found != expected)
    assert len(differs) <= (0 if exact else max(1, len(found) // 50))
    likeness = similarities(keys)
    for token in differs:
        assert abs(likeness[token, found[token]] - likeness[token, expected[token]]) < 1e-6


def usual_inputs(images: int, tokens: int, width: int, seed: int, method: str) -> tuple[Floats, Floats, list[int]]:
    """(saliency, features, quota), a third of each kind of attention; half of the pictures after an earlier cut."""
    dice = np.random.default_rng(seed)
    kinds = ("flat", "usual", "peaky")
    saliency = np.concatenate([realistic(kind, -(-images // 3), tokens, dice) for kind in kinds])[:images]
    rows = dice.standard_normal((images, tokens, width)) + dice.uniform(0, 3) * dice.standard_normal((images, 1, width))
    features = rows.astype(np.float32)
    left = np.full(images, tokens)
    if POLICIES[method].reselects:
        for image in range(0, images, 2):
            left[image] = dice.integers(1, tokens + 1)
            gone = dice.permutation(tokens)[left[image] :]
            saliency[image, gone], features[image, gone] = -1, 0
    return saliency, features, [int(dice.integers(1, many + 1)) for many in left]


@pytest.mark.parametrize("method", METHODS)
def test_thousands_of_random_inputs(export: Export, method: str) -> None:
    """Batches of mixed quotas; 2,000 pictures of 16 tokens, of which few hang on rounding."""
    graph, compared = export(method, 16), 0
    for seed in range(10):
        saliency, features, quota = usual_inputs(200, 16, 12, seed, method)
        compared += compare(graph, saliency, features, quota)
    assert compared >= 2000 * {"holov-paper": 0.85, "cdpruner-unconditional": 0.9, "divprune": 0.9}.get(method, 0.95)


@pytest.mark.parametrize(
    ("tokens", "images"), [(144, 30), (576, 9), pytest.param(2880, 3, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_random_inputs_at_true_sizes(export: Export, method: str, tokens: int, images: int) -> None:
    """The greedy rules at no more than 48 tokens: their near ties grow with the steps, which are checked below."""
    graph = export(method, tokens)
    saliency, features, quota = usual_inputs(images, tokens, SIZES[tokens][1], tokens, method)
    if method in GREEDY or method == "holov-paper":
        quota = [min(asked, 48) for asked in quota]
    compared = compare(graph, saliency, features, quota)
    assert compared >= images * {"holov-paper": 0.0, "cdpruner-unconditional": 0.3, "scope": 0.3}.get(method, 0.5)


def exact_inputs(images: int, tokens: int, width: int, seed: int, method: str) -> tuple[Floats, Floats, list[int]]:
    """Inputs on which float32 makes no error, and full of ties: rows of 1, 4 or 16 entries of 1 or -1, whose lengths
    are powers of two, and saliencies that are multiples of 2^-12. What the DPP divides by is exact for single entries.
    """
    dice = np.random.default_rng(seed)
    entries = [1] if method == "cdpruner-unconditional" else [size for size in (1, 4, 16) if size <= width]
    features = np.zeros((images, tokens, width), dtype=np.float32)
    for image in range(images):
        for token in range(tokens):
            places = dice.permutation(width)[: dice.choice(entries)]
            features[image, token, places] = dice.choice([-1.0, 1.0], len(places))
    saliency = (dice.integers(0, 256, (images, tokens)) / 4096).astype(np.float32)
    return saliency, features, [int(asked) for asked in dice.integers(1, tokens + 1, images)]


@pytest.mark.parametrize(("tokens", "images"), [(16, 300), (144, 12), (576, 2)], ids=str)
@pytest.mark.parametrize("method", [*GREEDY, "dart", "visionzip", "cls-topk"])
def test_exact_inputs_leave_nothing_out(export: Export, method: str, tokens: int, images: int) -> None:
    saliency, features, quota = exact_inputs(images, tokens, SIZES[tokens][1], tokens, method)
    assert compare(export(method, tokens), saliency, features, quota, exact=True) == images


# ---------------------------------------------------------------- steps


ORDERS: dict[str, Callable[[Floats, Floats], np.ndarray]] = {
    "scope": lambda saliency, features: scope_order(ScopePolicy(), saliency, features, 8),
    "divprune": lambda saliency, features: divprune_order(saliency, features, 8),
    "cdpruner-unconditional": lambda saliency, features: dpp_order(saliency, features, 8),
}


def order_of(state: np.ndarray, budget: int) -> list[int]:
    """The tokens in the order in which the steps took them."""
    assert sorted(-2 - state[state < -2]) == list(range(1, budget + 1))
    return [int(np.flatnonzero(state == -2 - step)[0]) for step in range(1, budget + 1)]


def worst_steps(method: str, order: list[int], saliency: Floats, features: Floats) -> Wide:
    """By how much each step misses the best score, in float64, given the steps before it."""
    similarity, tokens = similarities(features), len(saliency)
    covered, nearest, taken = np.zeros(tokens), np.full(tokens, -2.0), np.zeros(tokens, dtype=bool)
    left, factor, missed = np.ones(tokens), np.zeros((0, tokens)), []
    for step, token in enumerate(order):
        if method == "scope":
            score = np.maximum(similarity - covered, 0).sum(1) * saliency
            scale = max(score.max(), 1e-6)
        elif method == "divprune":
            score = -(nearest if step else np.where(np.eye(tokens, dtype=bool), -2, similarity).max(1))
            scale = 1.0
        else:
            score, scale = np.where(left > DPP_FLOOR, left, 0), 1.0
        score = np.where(taken, -np.inf, score)
        missed.append((score.max() - score[token]) / scale)
        taken[token] = True
        covered, nearest = np.maximum(covered, similarity[token]), np.maximum(nearest, similarity[token])
        if left[token] > DPP_FLOOR:
            row = (similarity[token] - factor[:, token] @ factor) / np.sqrt(left[token])
            factor, left = np.vstack([factor, row]), left - row**2
    return np.array(missed)


@pytest.mark.parametrize(
    ("tokens", "images", "budget"),
    [(16, 60, 16), (144, 12, 48), (576, 3, 192), pytest.param(2880, 2, 320, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("method", GREEDY)
def test_every_step_is_the_best(export: Export, method: str, tokens: int, images: int, budget: int) -> None:
    """No input left out: what a step takes scores within 1e-5 of the best one, given the graph's own past."""
    dice = np.random.default_rng(tokens)
    kinds = ("flat", "usual", "peaky")
    saliency = np.concatenate([realistic(kind, -(-images // 3), tokens, dice) for kind in kinds])[:images]
    features = features_of(images, tokens, tokens, SIZES[tokens][1])
    (state,) = export(method, tokens, steps=True).run(saliency, features, [1] * images, budget)
    for image in range(images):
        order = order_of(state[image], budget)
        assert worst_steps(method, order, saliency[image], features[image]).max() < 1e-5


def test_the_check_of_steps_sees_a_wrong_one() -> None:
    """Negative control: two steps exchanged are noticed."""
    saliency, features = realistic("usual", 1, 16, np.random.default_rng(0))[0], features_of(1, 16, 0)[0]
    for method, first in (("scope", 0), ("divprune", 0), ("cdpruner-unconditional", 1)):
        order = list(ORDERS[method](saliency, features))
        assert worst_steps(method, order, saliency, features).max() < 1e-5
        order[first], order[first + 1] = order[first + 1], order[first]
        assert worst_steps(method, order, saliency, features).max() > 1e-4


# ---------------------------------------------------------------- photographs


@dataclass(frozen=True)
class Seen:
    """What the demo model's tower makes of photographs: saliency [B, N] and each kind of features [B, N, *]."""

    saliency: Floats
    features: dict[FeatureSource, Floats]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """32 cut-outs of eight pictures that come with scikit-image, through the tower of the demo model."""
    names = ("astronaut", "camera", "chelsea", "coffee", "coins", "page", "rocket", "text")
    pictures = []
    for name in names:
        picture = Image.fromarray(getattr(data, name)()).convert("RGB")
        wide, high = picture.size[0] // 2, picture.size[1] // 2
        boxes = [(x * wide, y * high, (x + 1) * wide, (y + 1) * high) for x in range(2) for y in range(2)]
        pictures += [picture.crop(box) for box in boxes]
    folder = data_folder("demo-model")
    spec = spec_from_checkpoint(folder, "demo")
    with SafetensorsReader(folder) as reader:
        module = vision_from_checkpoint(spec, HolovPolicy(), reader, Precision.FP32)
    layer, tower = module.vision_tower.feature_layer, module.vision_tower
    with torch.no_grad():
        x = tower.before_feature_layer(torch.from_numpy(pixels_from_images(pictures, spec.image).pixel_values))
        normed, keys, values = layer.keys_and_values(x)
        hidden = layer.rows(x, normed, keys, values)[:, 1:]
        features = {
            FeatureSource.NONE: hidden,
            FeatureSource.HIDDEN: hidden,
            FeatureSource.PROJECTED: module.multi_modal_projector(hidden),
            FeatureSource.KEYS: keys.mean(1)[:, 1:],
        }
        saliency = layer.saliency(normed, keys).numpy()
    return Seen(saliency, {kind: rows.contiguous().numpy() for kind, rows in features.items()})


@pytest.mark.parametrize("method", METHODS)
def test_photographs(export: Export, seen: Seen, method: str) -> None:
    """Real attention and real features, at the budgets that the demo model's table has."""
    features = seen.features[POLICIES[method].features]
    graph = export(method, 144, features.shape[-1])
    budgets, compared = (4, 16, 48), 0
    for budget in budgets:
        quota = [budget if image % 4 else max(1, budget // 2) for image in range(len(features))]
        compared += compare(graph, seen.saliency, features, quota)
    shares = {"holov-paper": 0.5, "cdpruner-unconditional": 0.6, "divprune": 0.85}
    assert compared >= len(budgets) * len(features) * shares.get(method, 0.9)


@pytest.mark.parametrize("method", GREEDY)
def test_every_step_is_the_best_on_photographs(export: Export, seen: Seen, method: str) -> None:
    features = seen.features[POLICIES[method].features]
    (state,) = export(method, 144, features.shape[-1], steps=True).run(seen.saliency, features, [1] * len(features), 48)
    for image, rows in enumerate(features):
        order = order_of(state[image], 48)
        assert worst_steps(method, order, seen.saliency[image], rows).max() < 1e-5


# ---------------------------------------------------------------- what the graphs look like


@pytest.mark.parametrize("tokens", [144, 576])
@pytest.mark.parametrize("method", METHODS)
def test_tensorrt_would_take_it(export: Export, method: str, tokens: int) -> None:
    """No rule of the readiness check finds an error or a warning, no shape depends on data, nothing large is stored."""
    model = export(method, tokens).model
    for version in readiness_of(model).versions:
        assert version.ready, version
        assert not version.count("warning"), version
    operators = {node.op_type for graph in (model.graph, *bodies(model)) for node in graph.node}
    assert not operators & FORBIDDEN
    assert ("Loop" in operators) == (method in GREEDY)
    assert sources_of(model, shape_values(model)) <= {"budget"}
    assert max((np.prod(tensor.dims) for tensor in model.graph.initializer), default=0) <= 40 * tokens


@pytest.mark.parametrize("method", GREEDY)
def test_loops_count_and_keep_their_shapes(export: Export, method: str) -> None:
    model = export(method, 144).model
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    (body,) = bodies(model)
    assert loop.input[1] == "", "no condition"
    assert body.input[1].name not in {name for node in body.node for name in node.input}
    assert sources_of(model, iter([loop.input[0]])) == {"budget"}
    assert len(loop.input) == len(body.input) == len(body.output) + 1 == len(loop.output) + 2
    carried = [value.type.tensor_type.elem_type for value in (*body.input[2:], *body.output[1:])]
    assert set(carried) == {TensorProto.FLOAT}
    constants = {tensor.name for tensor in model.graph.initializer}
    assert set(shape_values(helper.make_model(body))) <= constants
