"""What passes between the HTTP side of a server and its worker: a job goes in, events come out.

Job --Worker.submit--> Seeing --> Piece, Piece, ... --> Finished | Failed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holov_export.runtime.media import Media, Seen
from holov_export.tensors import Generation, SamplingSettings


@dataclass(frozen=True)
class Job:
    """One answer that is wanted.

    Attributes:
        name: of the request, for logs: "chatcmpl-...".
        text: the rendered prompt, one placeholder for each image and clip.
        media: decoded images and clips, in the order of their placeholders.
        budget: tokens of each image that the client asked for; None leaves it to the controller.
    """

    name: str
    text: str
    media: Media
    sampling: SamplingSettings
    budget: int | None = None


@dataclass(frozen=True)
class Seeing:
    """The vision graph is done with a job.

    Attributes:
        budget: tokens that each image could keep.
        seen: what was kept, and where it is.
        waited: seconds in the queue. preprocess, vision: seconds of the batch that the job was in.
        batch: images and clips of that batch.
    """

    budget: int
    seen: Seen
    waited: float
    preprocess: float
    vision: float
    batch: int


@dataclass(frozen=True)
class Piece:
    """More text, and how many tokens there are by now. The text may be empty for the first token."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Finished:
    """The whole answer. `ttft` and `total` are seconds since the job was accepted, waiting included."""

    generation: Generation
    ttft: float
    total: float


@dataclass(frozen=True)
class Failed:
    """There will be no (further) answer. What is no `HolovExportError` is an internal error."""

    error: Exception


Event = Seeing | Piece | Finished | Failed
#: called from the worker's threads, for one job never twice at once; the last call is with Finished or Failed, or none
#: comes after `Ticket.cancel`. It must return at once and raise nothing.
Deliver = Callable[[Event], None]
