"""evaluation.json: what a run found, and about what."""

from __future__ import annotations

from fractions import Fraction

from pydantic import Field

from holov_export.policies import Frozen
from holov_export.verify.machine import Machine

SCHEMA = 1


class MetricValue(Frozen):
    """A value with its interval. None: not defined, or no interval (one group only, or draws without a value)."""

    metric: str
    value: float | None
    low: float | None
    high: float | None


class KindValue(Frozen):
    """A metric over the questions of one kind."""

    kind: str
    metric: str
    questions: int
    value: float | None


class CellResult(Frozen):
    """A rule at a budget.

    Attributes:
        method, budget: the cell. share: budget / N.
        own_share: "1/9", what each picture keeps of its own tokens; None where the budget is a number of tokens.
        inside: the rule prunes inside the language model; what it makes of a budget is its own affair.
        visual_tokens: that enter the language model, mean over the questions.
        layer_tokens: that a layer of the language model sees, mean over layers; compare rules inside it by this.
        metrics: the values. retention: of each measure of quality, its ratio to the unpruned run's.
        differences: value minus that of the baseline at the same budget; none for the baseline itself.
    """

    method: str
    budget: int
    share: float
    own_share: str | None = None
    inside: bool
    visual_tokens: float
    layer_tokens: float
    metrics: tuple[MetricValue, ...]
    retention: tuple[MetricValue, ...]
    differences: tuple[MetricValue, ...]
    kinds: tuple[KindValue, ...]


class DataInfo(Frozen):
    """The questions: how many were asked, and of how many in the file."""

    name: str
    format: str
    questions: int
    total: int
    pictures: int
    groups: int
    sha256: str


class BundleInfo(Frozen):
    """The bundle: its model, precision, decoder, N, and the sha256 of its manifest."""

    name: str
    model: str
    precision: str
    decoder: str
    tokens: int
    methods: tuple[str, ...]
    manifest_sha256: str


class AskInfo(Frozen):
    """How questions were asked."""

    decoder: str
    provider: str
    suffix: str
    max_new_tokens: int


class BootstrapInfo(Frozen):
    """How intervals were made: draws of whole groups, seed, and what share of draws an interval holds."""

    resamples: int
    seed: int
    confidence: float
    groups: int


class Evaluation(Frozen):
    """evaluation.json.

    Attributes:
        date, seconds, command: of the run that wrote it; a run that was killed and started again took longer.
        metric: name of the one that tables and the plot begin with. titles: of all metrics, by name.
        reference: the unpruned run. cells: the others, method by method, budgets from the largest.
        baseline: what `differences` are to.
    """

    schema_version: int = SCHEMA
    tool: str
    date: str
    seconds: float
    command: str
    machine: Machine
    data: DataInfo
    bundle: BundleInfo
    ask: AskInfo
    bootstrap: BootstrapInfo
    metric: str
    titles: tuple[tuple[str, str], ...]
    baseline: str
    reference: CellResult
    cells: tuple[CellResult, ...] = Field(min_length=1)
    remarks: tuple[str, ...]

    def title(self, metric: str) -> str:
        """A metric's words for tables."""
        return dict(self.titles).get(metric, metric)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def budgets(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.budget for cell in self.cells))

    @property
    def sizes(self) -> tuple[int | Fraction, ...]:
        """The budgets as they were asked for: numbers, and shares of each picture's own tokens."""
        return tuple(dict.fromkeys(Fraction(cell.own_share) if cell.own_share else cell.budget for cell in self.cells))


def budget_text(budget: int, own_share: str | None) -> str:
    """A budget as tables show it: "64", "1/9 of each"."""
    return str(budget) if own_share is None else f"{own_share} of each"


def value_of(values: tuple[MetricValue, ...], metric: str) -> MetricValue | None:
    """The value of a metric; None where it was not measured."""
    return next((item for item in values if item.metric == metric), None)
