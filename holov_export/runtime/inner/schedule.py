"""How many visual tokens of an image each layer of the language model sees: numbers only, no tensors.

A cut at layer L means that layers 0..L-1 run before it and layer L is the first that sees fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from holov_export.errors import BudgetError, UsageError
from holov_export.runtime.inner.methods import FastVSettings, PyramidDropSettings, SparseVlmSettings

#: the depth and the number of visual tokens that the published numbers are for (LLaVA-1.5-7B)
PUBLISHED_DEPTH, PUBLISHED_TOKENS = 32, 576

#: SparseVLM ranks by the attention of layers 2, 6 and 15 and prunes their outputs, so layers 3, 7, 16 see fewer.
#: Source: Gumpest/SparseVLMs@26a5f48 modelling_sparse_llama.py, pruning_loc
SPARSEVLM_LAYERS = (3, 7, 16)

#: SparseVLM: budget -> tokens kept at its three cuts.
#: Source: Gumpest/SparseVLMs@26a5f48 score.py, sparse_token_dict of version 1_0
SPARSEVLM_KEPT: dict[int, tuple[int, int, int]] = {
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
}

#: Source: Cooperx521/PyramidDrop@6444f30 README, --layer_list; its ratios 0.5, 0.25, 0.125 are powers of one half
PYRAMIDDROP_LAYERS = (8, 16, 24)

#: ours: below this ratio from one stage to the next, the stages move towards the input (published: 0.5)
SMALLEST_RATIO = 0.25


@dataclass(frozen=True)
class Cut:
    """`keep` tokens stay from `layer` on, and `merged` new ones, made of what was dropped, come behind them."""

    layer: int
    keep: int
    merged: int = 0

    @property
    def left(self) -> int:
        return self.keep + self.merged


@dataclass(frozen=True)
class Schedule:
    """The cuts of one image's N `tokens` in a decoder of `depth` layers, in the order of the layers."""

    tokens: int
    depth: int
    cuts: tuple[Cut, ...]

    @property
    def per_layer(self) -> tuple[int, ...]:
        """Visual tokens that enter each layer: what its key-value cache holds of the image."""
        counts, left = [], self.tokens
        at = {cut.layer: cut.left for cut in self.cuts}
        for layer in range(self.depth):
            left = at.get(layer, left)
            counts.append(left)
        return tuple(counts)

    @property
    def average(self) -> float:
        """Mean of `per_layer`."""
        return sum(self.per_layer) / self.depth

    def cut_at(self, layer: int) -> Cut | None:
        return next((cut for cut in self.cuts if cut.layer == layer), None)


def check_budget(budget: int, tokens: int) -> None:
    """Refuse a budget that an image does not have.

    Raises:
        BudgetError: it is outside 1..`tokens`.
    """
    if not 1 <= budget <= tokens:
        raise BudgetError(f"the budget is {budget}, it must be in 1..{tokens}.", hint="The image has no more tokens.")


def scaled_layers(published: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Layers of a decoder of 32 in one of `depth`: in proportion, rounded half up, rising, in 1..depth-1.

    A decoder too shallow for all of them gets the first ones.

    Raises:
        UsageError: a decoder of one layer has no place for a cut.
    """
    found: list[int] = []
    for layer in published:
        place = max(int(layer * depth / PUBLISHED_DEPTH + 0.5), found[-1] + 1 if found else 1)
        if place < depth:
            found.append(place)
    if not found:
        raise UsageError("the decoder has one layer; there is nothing to prune between layers.")
    return tuple(found)


def fastv_schedule(tokens: int, depth: int, budget: int, settings: FastVSettings) -> Schedule:
    """`budget` tokens from layer K on; layers before it see all, so the average over layers is higher.

    Raises:
        BudgetError: the budget is outside 1..N.
        UsageError: K is not below the depth.
    """
    check_budget(budget, tokens)
    if settings.layer >= depth:
        raise UsageError(f"FastV's layer is {settings.layer}, the decoder has {depth}.", hint="Choose a smaller one.")
    return Schedule(tokens, depth, (Cut(settings.layer, budget),))


def sparsevlm_kept(tokens: int, budget: int) -> tuple[int, int, int]:
    """Tokens kept at the three cuts: the published lists at 64, 96, 128 and 192 of 576, in between what lies between.

    The lists are taken as shares of N at a share of budget. Between two published budgets each entry is interpolated
    linearly, below 64 it falls to 0 in proportion, above 192 it rises to N at budget N. Rounded half up, at least 1.
    """
    place = budget * PUBLISHED_TOKENS / tokens
    knots = [(0, (0, 0, 0)), *SPARSEVLM_KEPT.items(), (PUBLISHED_TOKENS, (PUBLISHED_TOKENS,) * 3)]
    above = next(index for index, (share, _) in enumerate(knots) if place <= share)
    (low, fewer), (high, more) = knots[above - 1], knots[above]
    part = (place - low) / (high - low)
    scale = tokens / PUBLISHED_TOKENS
    first, second, third = (max(1, int((a + (b - a) * part) * scale + 0.5)) for a, b in zip(fewer, more, strict=True))
    return first, second, third


def recycled(dropped: int, settings: SparseVlmSettings) -> tuple[int, int]:
    """(tokens taken, clusters made) of so many dropped tokens."""
    if not settings.recycle or dropped == 0:
        return 0, 0
    taken = min(int(dropped * settings.recycle_share) + 1, dropped)
    return taken, min(taken // settings.cluster_size + 1, taken)


def sparsevlm_schedule(tokens: int, depth: int, budget: int, settings: SparseVlmSettings) -> Schedule:
    """Published layers scaled to the depth, published lists scaled to N and budget, merged tokens on top of them.

    At 576 tokens and 32 layers the published budgets are averages over layers, counted after each layer. Nothing is
    dropped at budget N, where the published code drops at least one token.

    Raises:
        BudgetError: the budget is outside 1..N.
        UsageError: a decoder of one layer.
    """
    check_budget(budget, tokens)
    cuts, left = [], tokens
    for layer, wanted in zip(scaled_layers(SPARSEVLM_LAYERS, depth), sparsevlm_kept(tokens, budget), strict=False):
        keep = min(wanted, left)
        cut = Cut(layer, keep, recycled(left - keep, settings)[1])
        cuts.append(cut)
        left = cut.left
    return Schedule(tokens, depth, tuple(cuts))


def pyramiddrop_schedule(tokens: int, depth: int, budget: int, settings: PyramidDropSettings) -> Schedule:
    """N * r, N * r^2, N * r^3 tokens from the three stages on (published: r = 1/2); r follows from the budget.

    By average: the largest r whose average over layers is at most the budget; 270 of 576 gives the published ratios.
    With r below a quarter, or where even one token a stage is above the budget, the stages move towards the input, to
    layers l, 2 l, 3 l with the largest l that will do. (Ours; kinredon/SCOPE's code moves them too, as to 2, 6, 16.)

    Raises:
        BudgetError: the budget is outside 1..N, or below what cuts from layer 1 on can reach; names the least.
        UsageError: a decoder of one layer.
    """
    check_budget(budget, tokens)
    layers = scaled_layers(PYRAMIDDROP_LAYERS, depth)
    if settings.budget_is == "last":
        ratio = (budget / tokens) ** (1 / len(layers))
        counts = [*(int(tokens * ratio**stage + 0.5) for stage in range(1, len(layers))), budget]
        return Schedule(tokens, depth, tuple(map(Cut, layers, counts)))
    choices = [layers]
    for first in range(layers[0] - 1, 0, -1):
        choices.append(tuple(first * stage for stage in (1, 2, 3) if first * stage < depth))
    for choice in choices:
        ratio = _largest_ratio(tokens, depth, budget, choice)
        if ratio >= SMALLEST_RATIO or (choice is choices[-1] and ratio > 0):
            return _pyramid(tokens, depth, choice, ratio)
    least = ceil(_pyramid(tokens, depth, choices[-1], 0).average)
    raise BudgetError(
        f"PyramidDrop cannot average {budget} tokens in {depth} layers: those before its first stage see {tokens}.",
        hint=f"Ask for at least {least}, or set budget_is='last'.",
    )


def _pyramid(tokens: int, depth: int, layers: tuple[int, ...], ratio: float) -> Schedule:
    counts = (max(1, int(tokens * ratio**stage)) for stage in range(1, len(layers) + 1))
    return Schedule(tokens, depth, tuple(map(Cut, layers, counts)))


def _largest_ratio(tokens: int, depth: int, budget: int, layers: tuple[int, ...]) -> float:
    """By bisection; 1 where nothing must go, 0 where the budget is out of reach."""
    if budget == tokens:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = _pyramid(tokens, depth, layers, middle).average <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low if _pyramid(tokens, depth, layers, low).average <= budget else 0.0
