"""What a server says of itself: the entry of /v1/models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from holov_export.runtime.session import Session
from holov_export.serve.limits import BudgetRange
from holov_export.spec import ImageSpec


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        id: its name in requests. created: seconds since 1970 when the server began.
        tokens: of every image before selection; None where images differ.
        largest_budget: that a request may name.
        budgets: that the server chooses from when a request names none.
        engine: the engines at work, for people.
    """

    id: str
    created: int
    tokens: int | None
    largest_budget: int
    budgets: BudgetRange
    method: str
    model: str
    engine: str


class ModelDetails(BaseModel):
    """The `holov` of `ModelEntry`."""

    tokens: int | None
    default_budget: int
    budget_range: tuple[int, int]
    largest_budget: int
    target_ttft_ms: float | None
    method: str
    model: str
    engine: str


class ModelEntry(BaseModel):
    """A model as the OpenAI API lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "holov-export"
    holov: ModelDetails


class ModelList(BaseModel):
    """Body of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


def served_from_session(session: Session, budgets: BudgetRange, created: int, name: str | None = None) -> Served:
    """Read what there is to say from a session; loads its decoder.

    Args:
        name: in requests; None for that of the model.
    """
    plan = session.bundle.manifest.plan
    return Served(
        id=name or plan.model.name,
        created=created,
        tokens=plan.tokens if isinstance(plan.model.image, ImageSpec) else None,
        largest_budget=largest_budget(session),
        budgets=budgets,
        method=session.bundle.method,
        model=plan.model.name,
        engine=session.name,
    )


def largest_budget(session: Session) -> int:
    """Tokens of the largest image or clip."""
    plan = session.bundle.manifest.plan
    return max(plan.of_part(part).tokens for part in plan.parts)


def entry_from_served(served: Served) -> ModelEntry:
    target = served.budgets.target_ttft
    details = ModelDetails(
        tokens=served.tokens,
        default_budget=served.budgets.largest,
        budget_range=(served.budgets.smallest, served.budgets.largest),
        largest_budget=served.largest_budget,
        target_ttft_ms=None if target is None else target * 1e3,
        method=served.method,
        model=served.model,
        engine=served.engine,
    )
    return ModelEntry(id=served.id, created=served.created, holov=details)
