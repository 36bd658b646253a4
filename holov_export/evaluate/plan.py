"""Which cells of the table are asked: every rule at every budget, and the unpruned run that all are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holov_export.bundle import Bundle
from holov_export.errors import BudgetError, UnknownNameError, UsageError
from holov_export.evaluate.inner import INNER_METHODS, average_from_budget
from holov_export.evaluate.journal import CellKey
from holov_export.runtime.runner import checked_budget

#: shares of N where no budgets are named: a third, two ninths and a ninth (192, 128, 64 of 576)
DEFAULT_SHARES = ((1, 3), (2, 9), (1, 9))


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
    """

    method: str
    budget: int
    asked: CellKey
    graph: str
    graph_budget: int
    inner: bool = False
    layer_average: float | None = None


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


def plan_from_bundle(
    bundle: Bundle,
    methods: Sequence[str],
    budgets: Sequence[int],
    *,
    decoder: str = "genai",
    baseline: str | None = None,
) -> Plan:
    """The cells of some rules and budgets.

    Args:
        bundle: an opened bundle.
        methods: names of its graphs, or with the decoder "hf" of rules inside the language model; () for all graphs.
        budgets: () for the default shares of N.
        decoder: "genai" or "hf".
        baseline: one of the methods; None for "holov" if it is among them, else the first.

    Raises:
        UnknownNameError: the bundle has no such graph; the message names those it has.
        UsageError: a rule inside the language model without "hf", a baseline that is not measured, or no rule of the
            bundle keeps everything at the full budget.
        BudgetError: a budget outside 1..N.
    """
    tokens = bundle.manifest.plan.model.vision.tokens
    graphs = bundle.methods
    wanted = tuple(dict.fromkeys(methods)) or graphs
    for method in wanted:
        _check_method(method, graphs, decoder)
    chosen = budgets or [max(1, round(tokens * over / under)) for over, under in DEFAULT_SHARES]
    sizes = tuple(sorted({checked_budget(budget, tokens) for budget in chosen}, reverse=True))
    full, remarks = _lossless_graph(bundle)
    reference = Cell(full, tokens, (full, tokens), full, tokens)
    if baseline is not None and baseline not in wanted:
        raise UsageError(f"the baseline '{baseline}' is not among the methods: {', '.join(wanted)}.")
    cells, left_out = _cells(bundle, wanted, sizes, reference)
    compared = baseline or ("holov" if "holov" in wanted else wanted[0])
    return Plan(tokens, wanted, sizes, reference, cells, compared, (*remarks, *left_out))


def _cells(
    bundle: Bundle, methods: Sequence[str], budgets: Sequence[int], reference: Cell
) -> tuple[tuple[Cell, ...], list[str]]:
    """The cells, and why some are left out: not every rule inside the language model can reach every budget."""
    cells: list[Cell] = []
    left_out: list[str] = []
    for method in methods:
        failed: BudgetError | None = None
        before = len(cells)
        for budget in budgets:
            try:
                cells.append(_cell(bundle, method, budget, reference))
            except BudgetError as error:
                failed = error
                left_out.append(f"{method} at {budget} is left out: {error.message.rstrip('.')}")
        if failed is not None and len(cells) == before:
            raise failed
    return tuple(cells), left_out


def _cell(bundle: Bundle, method: str, budget: int, reference: Cell) -> Cell:
    inner = method not in bundle.methods
    whole = budget == reference.budget
    if whole and (inner or (keeps_all_at_full(bundle, method) and not cuts_inside(bundle, method))):
        return Cell(method, budget, reference.asked, reference.graph, reference.budget)
    if not inner:
        return Cell(method, budget, (method, budget), method, budget)
    depth = bundle.manifest.plan.model.decoder.layers
    average = average_from_budget(method, budget, reference.budget, depth)
    return Cell(method, budget, (method, budget), reference.graph, reference.budget, True, average)


def _check_method(method: str, graphs: Sequence[str], decoder: str) -> None:
    if method in graphs:
        return
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
