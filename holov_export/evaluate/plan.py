"""Which cells of the table are asked: every rule at every budget, and the unpruned run that all are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, UnknownNameError, UsageError
from holov_export.evaluate.inner import INNER_METHODS, average_from_budget
from holov_export.evaluate.journal import CellKey
from holov_export.runtime.runner import checked_budget

#: a number of tokens, or a share: of N, or where pictures have unequal numbers of tokens, of each one's own
Size = int | Fraction
#: where no budgets are named: a third, two ninths and a ninth (192, 128, 64 of 576)
DEFAULT_SHARES = (Fraction(1, 3), Fraction(2, 9), Fraction(1, 9))


@dataclass(frozen=True)
class Cell:
    """A rule at a budget.

    Attributes:
        method, budget: as tables show them.
        asked: (method, budget) of the journal's entries. A rule that loses nothing at the full budget is not asked
            there again: its answers are those of the unpruned run.
        graph: the bundle's graph that makes the visual tokens, and `graph_budget` the tokens it keeps.
        inner: the rule prunes inside the language model, after the graph.
        layer_average: visual tokens that a layer of the language model sees, mean over layers; None for those that
            the graph gives.
        share: what each picture keeps of its own tokens, where pictures have unequal numbers of them; the budgets are
            then those of the largest picture that the model can have. None where a budget is a number of tokens; a
            picture that has fewer keeps all.
    """

    method: str
    budget: int
    asked: CellKey
    graph: str
    graph_budget: int
    inner: bool = False
    layer_average: float | None = None
    share: Fraction | None = None

    @property
    def words(self) -> str:
        """The budget as messages say it: "64", "1/9 of each"."""
        return str(self.budget) if self.share is None else f"{self.share} of each"

    def kept_of(self, tokens: int) -> int:
        """Budget of the graph for a picture of so many tokens."""
        return self.graph_budget if self.share is None else tokens_of_share(self.share, tokens)


@dataclass(frozen=True)
class Plan:
    """All cells of a table.

    Attributes:
        tokens: N. methods: rows, in the order asked for. budgets: from the largest.
        reference: the unpruned cell. cells: the others, method by method.
        baseline: the rule that the others are compared with.
        remarks: what a reader must know.
    """

    tokens: int
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    reference: Cell
    cells: tuple[Cell, ...]
    baseline: str
    remarks: tuple[str, ...] = ()

    def to_ask(self) -> tuple[Cell, ...]:
        """Each cell of the journal once, the unpruned one first."""
        found: dict[CellKey, Cell] = {}
        for cell in (self.reference, *self.cells):
            found.setdefault(cell.asked, cell)
        return tuple(found.values())


def tokens_of_share(share: Fraction, tokens: int) -> int:
    """Rounded, at least 1."""
    return max(1, round(tokens * share))


def plan_from_bundle(
    bundle: Bundle,
    methods: Sequence[str],
    budgets: Sequence[Size],
    *,
    decoder: str = "auto",
    baseline: str | None = None,
) -> Plan:
    """The cells of some rules and budgets.

    Args:
        bundle: an opened bundle.
        methods: names of its graphs, or with the decoder "hf" of rules inside the language model; () for all graphs.
        budgets: numbers of tokens or shares; () for the default shares.
        decoder: as of `AskSettings`.
        baseline: one of the methods; None for "holov" if it is among them, else the first.

    Raises:
        UnknownNameError: the bundle has no such graph; the message names those it has.
        UsageError: a rule inside the language model without "hf", a baseline that is not measured, or no rule of the
            bundle keeps everything at the full budget; or a rule inside the language model where pictures have
            unequal numbers of tokens.
        BudgetError: a budget outside 1..N, a share outside 0..1, or two that are the same of the largest picture.
    """
    tokens = bundle.manifest.plan.model.image_tokens  # of pictures: no data here has clips
    graphs = bundle.methods
    wanted = tuple(dict.fromkeys(methods)) or graphs
    for method in wanted:
        _check_method(method, bundle, decoder)
    sizes = _sizes(budgets or DEFAULT_SHARES, tokens, packed=bundle.manifest.plan.packed)
    full, remarks = _lossless_graph(bundle)
    if bundle.manifest.plan.packed:
        remarks = (*remarks, f"pictures have unequal numbers of tokens, at most {tokens}; what has fewer keeps all")
    reference = Cell(full, tokens, (full, tokens), full, tokens)
    if baseline is not None and baseline not in wanted:
        raise UsageError(f"the baseline '{baseline}' is not among the methods: {', '.join(wanted)}.")
    cells, left_out = _cells(bundle, wanted, sizes, reference)
    compared = baseline or ("holov" if "holov" in wanted else wanted[0])
    return Plan(tokens, wanted, tuple(sizes), reference, cells, compared, (*remarks, *left_out))


def _sizes(budgets: Sequence[Size], tokens: int, *, packed: bool) -> dict[int, Fraction | None]:
    """Each budget of the largest picture, from the largest, with the share that it stands for in each picture."""
    found: dict[int, Fraction | None] = {}
    for size in dict.fromkeys(budgets):
        if not isinstance(size, Fraction):
            budget, share = checked_budget(size, tokens), None
        elif not 0 < size <= 1:
            raise BudgetError(f"the share {size} is outside 0..1.")
        else:
            budget, share = tokens_of_share(size, tokens), size if packed and size < 1 else None
        if found.setdefault(budget, share) != share:
            raise BudgetError(
                f"two budgets are {budget} of the largest picture's {tokens} tokens.", hint="Leave one of them out."
            )
    return dict(sorted(found.items(), reverse=True))


def _cells(
    bundle: Bundle, methods: Sequence[str], sizes: Mapping[int, Fraction | None], reference: Cell
) -> tuple[tuple[Cell, ...], list[str]]:
    """The cells, and why some are left out: not every rule inside the language model can reach every budget."""
    cells: list[Cell] = []
    left_out: list[str] = []
    for method in methods:
        failed: BudgetError | None = None
        before = len(cells)
        for budget, share in sizes.items():
            try:
                cells.append(_cell(bundle, method, budget, share, reference))
            except BudgetError as error:
                failed = error
                left_out.append(f"{method} at {budget} is left out: {error.message.rstrip('.')}")
        if failed is not None and len(cells) == before:
            raise failed
    return tuple(cells), left_out


def _cell(bundle: Bundle, method: str, budget: int, share: Fraction | None, reference: Cell) -> Cell:
    inner = method not in bundle.methods
    if share is not None:  # the journal tells it from a budget that is a number
        return Cell(method, budget, (f"{method}, {share} of each", budget), method, budget, share=share)
    whole = budget == reference.budget
    if whole and (inner or (keeps_all_at_full(bundle, method) and not cuts_inside(bundle, method))):
        return Cell(method, budget, reference.asked, reference.graph, reference.budget)
    if not inner:
        return Cell(method, budget, (method, budget), method, budget)
    depth = bundle.manifest.plan.model.decoder.layers
    average = average_from_budget(method, budget, reference.budget, depth)
    return Cell(method, budget, (method, budget), reference.graph, reference.budget, True, average)


def _check_method(method: str, bundle: Bundle, decoder: str) -> None:
    graphs = bundle.methods
    if method in graphs:
        return
    if method in INNER_METHODS and bundle.manifest.plan.packed:
        raise UsageError(f"'{method}' is compared only where all pictures have as many tokens.")
    if method in INNER_METHODS and decoder == "hf":
        return
    if method in INNER_METHODS:
        raise UsageError(
            f"'{method}' prunes inside the language model and is not in the graph.", hint="Add --decoder hf."
        )
    also = f" With --decoder hf also: {', '.join(INNER_METHODS)}."
    raise UnknownNameError(
        f"the bundle has no method '{method}'; it has: {', '.join(graphs)}.",
        hint=f"Export it with the methods that you want to compare.{also}",
    )


def _lossless_graph(bundle: Bundle) -> tuple[str, tuple[str, ...]]:
    """The first graph that keeps every token at the full budget, one without a cut if there is one, and remarks.

    It does not depend on what is compared, so that a later run with other methods finds the unpruned answers again.
    """
    lossless = [name for name in bundle.methods if keeps_all_at_full(bundle, name)]
    plain = [name for name in lossless if not cuts_inside(bundle, name)]
    if plain:
        return plain[0], ()
    if lossless:
        return lossless[0], (
            f"the unpruned run is {lossless[0]} at the full budget, for the bundle has no graph without a cut",
        )
    raise UsageError(
        f"no method of the bundle keeps every token at the full budget ({', '.join(bundle.methods)}), so there is no "
        "unpruned run to compare with.",
        hint="Export the bundle with another method beside it, such as holov.",
    )


def keeps_all_at_full(bundle: Bundle, name: str) -> bool:
    """Whether a graph keeps every token at budget N; earlier cuts keep the budget at least, so the rule decides."""
    return bundle.of_method(name).manifest.plan.policy.lossless_at_full


def cuts_inside(bundle: Bundle, name: str) -> bool:
    """Whether a graph cuts elsewhere in the tower than at the usual place."""
    return bool(bundle.of_method(name).manifest.plan.cuts)
