"""Trying again: what passes by itself, and for how long to hope."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import grpc
import pytest
import stamina
from google.rpc import error_details_pb2, status_pb2

from mlsys.retry import resuming, retrying, transient

pytestmark = pytest.mark.anyio

CODES = grpc.StatusCode
PASSING = {
    CODES.UNAVAILABLE,
    CODES.ABORTED,
    CODES.UNKNOWN,
    CODES.DEADLINE_EXCEEDED,
}


def failure(
    code: grpc.StatusCode, details: str | None = "said", retry_after: float | None = None
) -> grpc.aio.AioRpcError:
    trailer = grpc.aio.Metadata()
    if retry_after is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(retry_after * 1e9))
        status = status_pb2.Status(code=code.value[0], message=details)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="BUSY"))
        status.details.add().Pack(info)
        trailer.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailer, details)


LOST = failure(CODES.UNAVAILABLE)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_only_some_statuses_pass_by_themselves(code: grpc.StatusCode) -> None:
    assert transient(failure(code)) is (code in PASSING)


@pytest.mark.parametrize(
    ("details", "passes"),
    [
        ("Received RST_STREAM with error code 2", True),
        ("stream terminated by RST_STREAM", True),
        ("GOAWAY received", True),
        ("Received unexpected EOS on DATA frame from server", True),
        ("HTTP/2 error code: INTERNAL_ERROR", True),
        ("Internal error from Core", True),
        ("An internal error occurred and the request could not be completed", False),
        ("", False),
        (None, False),
    ],
)
def test_an_internal_error_passes_where_the_connection_is_at_fault(
    details: str | None, passes: bool
) -> None:
    assert transient(failure(CODES.INTERNAL, details)) is passes


@pytest.mark.parametrize("seconds", [0.25, 30.0, 3600.0])
def test_a_used_up_quota_passes_when_the_server_says(seconds: float) -> None:
    error = failure(CODES.RESOURCE_EXHAUSTED, retry_after=seconds)

    assert transient(error) == seconds
    assert not isinstance(transient(error), bool)


def test_a_server_that_says_at_once_is_asked_again_after_the_usual_wait() -> None:
    assert transient(failure(CODES.RESOURCE_EXHAUSTED, retry_after=0)) is True


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), TimeoutError()])
def test_a_broken_or_silent_connection_passes(error: Exception) -> None:
    assert transient(error) is True


@pytest.mark.parametrize("error", [ValueError(), OSError(), KeyError()])
def test_other_exceptions_do_not_pass(error: Exception) -> None:
    assert transient(error) is False


class Calls:
    """A call that fails as often as it is told to."""

    def __init__(self, *failures: BaseException) -> None:
        self._failures = list(failures)
        self.made = 0

    async def __call__(self) -> str:
        self.made += 1
        if self._failures:
            raise self._failures.pop(0)
        return "answer"


@pytest.mark.usefixtures("no_backoff")
async def test_a_call_is_made_until_it_is_answered() -> None:
    call = Calls(LOST, failure(CODES.ABORTED), ConnectionResetError())

    assert await retrying(call, seconds=10) == "answer"
    assert call.made == 4


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("error", [failure(CODES.PERMISSION_DENIED), ValueError("mine")])
async def test_a_failure_that_does_not_pass_is_raised_at_once(error: Exception) -> None:
    call = Calls(error)

    with pytest.raises(type(error)) as raised:
        await retrying(call, seconds=10)
    assert raised.value is error
    assert call.made == 1


@pytest.mark.usefixtures("no_backoff")
async def test_a_caller_may_know_of_other_failures_that_pass() -> None:
    call = Calls(KeyError(), LOST)

    answer = await retrying(call, seconds=10, also=lambda error: isinstance(error, KeyError))
    assert answer == "answer"


async def test_a_call_that_is_never_answered_raises_its_last_failure() -> None:
    last = failure(CODES.ABORTED)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await retrying(Calls(LOST, last, *[last] * 100), seconds=0.01)
    assert raised.value is last


async def test_the_wait_that_a_server_asks_for_is_kept() -> None:
    waits: list[float] = []
    stamina.instrumentation.set_on_retry_hooks([lambda details: waits.append(details.wait_for)])
    busy = [failure(CODES.RESOURCE_EXHAUSTED, retry_after=seconds) for seconds in (0.015, 0.025)]

    assert await retrying(Calls(*busy), seconds=10) == "answer"
    assert waits == pytest.approx([0.015, 0.025])


@pytest.mark.parametrize("failures", [1, 2])
async def test_time_counts_from_the_first_failure_however_long_that_was_in_coming(
    failures: int,
) -> None:
    calls = 0

    async def call() -> str:
        nonlocal calls
        calls += 1
        if calls > failures:
            return "an answer"
        await anyio.sleep(0.1)
        raise TimeoutError

    if failures == 1:
        assert await retrying(call, seconds=0.05) == "an answer"
    else:
        with pytest.raises(TimeoutError):
            await retrying(call, seconds=0.05)
    assert calls == 2


class Work:
    """Work that gets on by a step each time, and then fails, as long as it has failures."""

    def __init__(self, *failures: tuple[int, BaseException]) -> None:
        self._failures = list(failures)
        self.done = 0
        self.runs = 0

    async def __call__(self) -> str:
        self.runs += 1
        if self._failures:
            steps, error = self._failures.pop(0)
            self.done += steps
            raise error
        return "done"


@pytest.mark.usefixtures("no_backoff")
async def test_work_that_gets_on_goes_on_however_often_it_breaks() -> None:
    work = Work(*[(1, LOST)] * 100)

    assert await resuming(work, progress=lambda: work.done, seconds=10) == "done"
    assert work.done == 100


async def test_work_that_gets_on_does_not_wait() -> None:
    waits: list[float] = []
    stamina.instrumentation.set_on_retry_hooks([lambda details: waits.append(details.wait_for)])
    work = Work(*[(1, LOST)] * 20)

    assert await resuming(work, progress=lambda: work.done, seconds=0.001) == "done"
    assert waits == []


@pytest.mark.usefixtures("no_backoff")
async def test_work_that_gets_nowhere_is_tried_again_for_a_while() -> None:
    work = Work((5, LOST), (0, LOST), (0, LOST), (1, LOST), (0, LOST))

    assert await resuming(work, progress=lambda: work.done, seconds=10) == "done"
    assert work.runs == 6


async def test_work_that_gets_nowhere_is_given_up() -> None:
    work = Work((5, LOST), *[(0, LOST)] * 100)

    with pytest.raises(grpc.aio.AioRpcError):
        await resuming(work, progress=lambda: work.done, seconds=0.01)
    assert work.runs < 10


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("error", [failure(CODES.PERMISSION_DENIED), ValueError(), OSError()])
async def test_work_that_fails_for_good_is_not_tried_again(steps: int, error: Exception) -> None:
    work = Work((steps, error))

    with pytest.raises(type(error)) as raised:
        await resuming(work, progress=lambda: work.done, seconds=10)
    assert raised.value is error
    assert work.runs == 1


@pytest.mark.parametrize("steps", [0, 3])
async def test_a_wait_longer_than_the_time_that_is_left_is_not_waited(steps: int) -> None:
    busy = failure(CODES.RESOURCE_EXHAUSTED, retry_after=11)
    work = Work((steps, busy))

    with anyio.fail_after(5), pytest.raises(grpc.aio.AioRpcError) as caught:
        await resuming(work, progress=lambda: work.done, seconds=10)

    assert caught.value is busy
    assert work.runs == 1


async def test_waits_of_a_server_that_stays_busy_come_to_an_end() -> None:
    busy = Calls(*[failure(CODES.RESOURCE_EXHAUSTED, retry_after=0.04)] * 100)

    with anyio.fail_after(5), pytest.raises(grpc.aio.AioRpcError):
        await retrying(busy, seconds=0.1)

    assert 2 <= busy.made <= 4


@pytest.mark.parametrize("steps", [0, 3])
async def test_work_waits_as_long_as_the_server_says_even_if_it_gets_on(steps: int) -> None:
    work = Work((steps, failure(CODES.RESOURCE_EXHAUSTED, retry_after=3600)))
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def resume() -> None:
                await resuming(work, progress=lambda: work.done, seconds=3600)

            tasks.start_soon(resume)
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
            scope.cancel()

    assert work.runs == 1


async def test_work_can_be_cancelled_while_it_waits() -> None:
    work = Work(*[(0, LOST)] * 100)
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        stamina.instrumentation.set_on_retry_hooks([lambda details: scope.cancel()])
        await resuming(work, progress=lambda: work.done, seconds=1000)

    assert scope.cancelled_caught
    assert work.runs == 1
