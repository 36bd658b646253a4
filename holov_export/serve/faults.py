"""What went wrong, as the OpenAI API says it: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.responses import Response

from holov_export.errors import (
    BudgetError,
    BundleError,
    BusyError,
    CheckpointError,
    EngineError,
    HolovExportError,
    ImageError,
    LateError,
    MissingExtraError,
    NetworkError,
    PromptError,
    UsageError,
    VideoError,
)

LOG = logging.getLogger("holov_export.serve")
#: usage errors of whoever runs the server, not of whoever asks it
_OF_THE_SERVER = (BundleError, CheckpointError, EngineError)
#: the field that is at fault, and a word for programs; the first that fits
_OF_THE_REQUEST: tuple[tuple[type[UsageError], str | None, str | None], ...] = (
    (VideoError, "messages", "invalid_video"),
    (ImageError, "messages", "invalid_image"),
    (BudgetError, "budget", "invalid_budget"),
    (PromptError, "messages", "invalid_prompt"),
    (UsageError, None, None),
)


@dataclass(frozen=True)
class Fault:
    """A refusal or a failure.

    Attributes:
        status: of HTTP.
        param: the field of the request that is at fault.
        code: a word for programs.
        retry_after: seconds after which another try makes sense.
        close: the connection ends with it, because the rest of the request is not wanted.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    close: bool = False

    @property
    def kind(self) -> str:
        """The `type` of the OpenAI API."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


class FaultError(Exception):
    """Ends the handling of a request with a `Fault`; it does not leave the HTTP side."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class ErrorBody(BaseModel):
    """The inside of `ErrorReply`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Body of every answer that is an error, and of an event that ends a stream early."""

    error: ErrorBody


def refused(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> FaultError:
    """A request that is wrong."""
    return FaultError(Fault(status, message, param, code))


def fault_from_error(error: Exception, *, draining: bool = False) -> Fault:
    """What a client is told of an error. Of an internal one it is told nothing; the log has the traceback.

    Args:
        draining: the server is shutting down.
    """
    if isinstance(error, FaultError):
        return error.fault
    if isinstance(error, BusyError):
        if draining:
            return Fault(503, "the server is shutting down.", code="shutting_down", retry_after=error.retry_after)
        return Fault(429, str(error), code="rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, LateError):
        return Fault(503, str(error), code="timeout", retry_after=1.0)
    if isinstance(error, UsageError) and not isinstance(error, _OF_THE_SERVER):
        for kind, param, code in _OF_THE_REQUEST:
            if isinstance(error, kind):
                return Fault(400, str(error), param, code)
    if isinstance(error, MissingExtraError):
        return Fault(501, error.message, code="not_installed")
    if isinstance(error, NetworkError):
        LOG.error("%s", error)
        return Fault(503, "the decoder's server cannot be reached.", code="decoder_unreachable", retry_after=5.0)
    if isinstance(error, HolovExportError):
        LOG.error("%s", error)
    else:
        LOG.error("internal error", exc_info=error)
    return Fault(500, "internal error; the server's log says more.", code="internal_error")


def reply_of_fault(fault: Fault) -> ErrorReply:
    return ErrorReply(error=ErrorBody(message=fault.message, type=fault.kind, param=fault.param, code=fault.code))


def response_from_fault(fault: Fault) -> Response:
    """The whole answer, with `Retry-After` in full seconds where another try makes sense."""
    response = Response(reply_of_fault(fault).model_dump_json(), fault.status, media_type="application/json")
    if fault.retry_after is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(fault.retry_after)))
    if fault.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    if fault.close:
        response.headers["connection"] = "close"
    return response
