"""What a server takes, so that no client can take all of it."""

from __future__ import annotations

from pydantic import Field, model_validator

from holov_export.policies import Frozen


class Limits(Frozen):
    """Limits of one server.

    Attributes:
        body_bytes: of a request's body.
        pixels: of one image, before it is decoded. images, videos: of one request.
        prompt_characters: of all texts of one request.
        new_tokens: longest answer; a request that asks for more is refused.
        queue: requests that wait or run at once; further ones get 429.
        vision_batch: images that go into one run of the vision graph.
        streams: answers that are decoded in turn; never more than the decoder has lanes.
        queue_seconds: a request that has waited so long gets 503.
        request_seconds: from acceptance to the last token; then the answer ends with an error.
        drain_seconds: how long a shutdown waits for answers that are being made.
    """

    body_bytes: int = Field(default=32 << 20, ge=1024)
    pixels: int = Field(default=40_000_000, ge=1)
    images: int = Field(default=8, ge=1)
    videos: int = Field(default=1, ge=0)
    prompt_characters: int = Field(default=100_000, ge=1)
    new_tokens: int = Field(default=2048, ge=1)
    queue: int = Field(default=256, ge=1)
    vision_batch: int = Field(default=8, ge=1)
    streams: int = Field(default=8, ge=1)
    queue_seconds: float = Field(default=60.0, gt=0)
    request_seconds: float = Field(default=300.0, gt=0)
    drain_seconds: float = Field(default=30.0, ge=0)


class BudgetRange(Frozen):
    """What the budget controller may choose from.

    Attributes:
        target_ttft: seconds to the first token that it aims at; None leaves every budget at `largest`.
        smallest, largest: tokens of an image.
    """

    target_ttft: float | None = Field(default=None, gt=0)
    smallest: int = Field(ge=1)
    largest: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> BudgetRange:
        if self.smallest > self.largest:
            raise ValueError(f"the smallest budget {self.smallest} is larger than the largest {self.largest}")
        return self
