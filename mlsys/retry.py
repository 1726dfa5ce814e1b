"""Which failures of a call pass by themselves, and how long to wait for that.

What may be tried again: https://cloud.google.com/bigquery/docs/error-messages and the retry
settings of the Storage API clients.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp
import anyio
import grpc
import stamina
from google.api_core.exceptions import from_grpc_error
from google.rpc.error_details_pb2 import RetryInfo

_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}

# https://cloud.google.com/storage/docs/retry-strategy
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_LOST = (ConnectionError, TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)

# What grpcio says where a write to a call fails as the call ends, instead of the server's status.
OVERWRITTEN = "Internal error from Core"

_BROKEN = ("RST_STREAM", "GOAWAY", "EOS", "INTERNAL_ERROR", OVERWRITTEN.upper())


def transient(error: BaseException) -> bool | float:
    """Whether a call may be tried again; a number says after how many seconds.

    INTERNAL passes only where it is HTTP/2 that broke (RST_STREAM, GOAWAY), or where grpcio could
    not write to a call that had ended and hides why: otherwise it is the server's word that
    something is wrong. Over HTTP, 429 and 5xx pass, after the time that Retry-After says.
    RESOURCE_EXHAUSTED passes only where the server says when (RetryInfo):
    without it, a quota is used up.
    """
    if isinstance(error, _LOST):
        return True
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _TRANSIENT_STATUS and (_retry_after(error) or True)
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        wait = _retry_info(error)
        return False if wait is None else wait or True
    if error.code() is grpc.StatusCode.INTERNAL:
        details = (error.details() or "").upper()
        return any(word in details for word in _BROKEN)
    return error.code() in _TRANSIENT


def _retry_after(error: aiohttp.ClientResponseError) -> float | None:
    told = (error.headers or {}).get("Retry-After", "")
    return float(told) if told.isdecimal() else None


def _retry_info(error: grpc.aio.AioRpcError) -> float | None:
    try:
        details = from_grpc_error(error).details
    except ValueError:  # They speak of another status than the call's.
        return None
    for detail in details:
        if isinstance(detail, RetryInfo):
            return detail.retry_delay.ToTimedelta().total_seconds()
    return None


class Silence:
    """Ends work for which the server has not said anything for too long.

    One for a connection, in place of a timer for each message: those come by the thousand.

    Args:
        seconds: until `watch` raises, or up to a quarter longer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def begin(self) -> None:
        """Something is expected, or has come and more is expected: time counts from now."""
        self._since = anyio.current_time()

    def end(self) -> None:
        """Nothing is expected of the server."""
        self._since = None

    async def watch(self) -> None:
        """Raises TimeoutError once the server has been silent for too long."""
        while True:
            await anyio.sleep(self._seconds / 4)
            if self._since is not None and anyio.current_time() - self._since > self._seconds:
                raise TimeoutError("the server does not answer")


async def retrying[T](
    call: Callable[[], Awaitable[T]],
    *,
    seconds: float,
    also: Callable[[BaseException], bool] = lambda _: False,
) -> T:
    """Awaits `call()` until it succeeds, fails for good, or has failed for `seconds`."""
    return await resuming(call, progress=lambda: 0, seconds=seconds, also=also)


async def resuming[T](
    work: Callable[[], Awaitable[T]],
    *,
    progress: Callable[[], int],
    seconds: float,
    also: Callable[[BaseException], bool] = lambda _: False,
) -> T:
    """Runs `work` again after each transient failure, for as long as it gets further.

    Args:
        work: takes up where it was left off each time it is called.
        progress: how far the work has come; a number that only grows.
        seconds: how long to try without any progress, from the first failure on. A server that
            asks for a longer wait than is left of them is not waited for.
        also: what else passes by itself.
    """
    failed_at, reached, attempts, began = None, progress(), 0, anyio.current_time()

    def passes(error: BaseException) -> bool | float:
        wait = transient(error) or also(error)
        anew = attempts == 1 or progress() != reached
        left = seconds if anew else seconds - (anyio.current_time() - began)
        return wait if wait is True or wait <= left else False

    def passes_here(error: BaseException) -> bool | float:
        return progress() == reached and passes(error)

    while True:
        reached, attempts, began = progress(), 0, anyio.current_time()
        try:
            async for attempt in stamina.retry_context(
                on=passes_here, attempts=None, timeout=seconds
            ):
                attempts += 1
                with attempt:
                    return await work()
        except Exception as error:
            wait = passes(error)
            # stamina's time begins with the first attempt, which may have waited for longer than
            # that for an answer.
            waited = anyio.current_time() - began > seconds
            first = waited and attempts == 1 and failed_at != reached
            failed_at = reached
            if not wait or (progress() == reached and not first):
                raise
            if wait is not True:
                await anyio.sleep(wait)
