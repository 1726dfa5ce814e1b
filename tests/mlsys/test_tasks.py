"""Task groups: one failure comes out, and as itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from mlsys.tasks import task_group

pytestmark = pytest.mark.anyio


async def fail(error: BaseException) -> None:
    raise error


async def fail_beside(other: Callable[[], Awaitable[None]], error: BaseException) -> None:
    """Raises in one task once another one waits."""
    async with task_group() as tasks:
        tasks.start_soon(other)
        await anyio.lowlevel.checkpoint()
        tasks.start_soon(fail, error)


async def test_what_a_task_raises_comes_out_as_itself() -> None:
    with pytest.raises(ZeroDivisionError, match="mine"):
        async with task_group() as tasks:
            tasks.start_soon(fail, ZeroDivisionError("mine"))


async def test_what_the_block_raises_comes_out_as_itself() -> None:
    with pytest.raises(ZeroDivisionError, match="mine"):
        async with task_group():
            raise ZeroDivisionError("mine")


async def test_the_first_failure_is_the_one_that_is_heard() -> None:
    failed = anyio.Event()

    async def echo() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            failed.set()
            raise OSError("an echo")

    with pytest.raises(ZeroDivisionError, match="first"):
        await fail_beside(echo, ZeroDivisionError("first"))
    assert failed.is_set()


async def test_a_failure_keeps_its_cause() -> None:
    cause = OSError("below")

    async def translate() -> None:
        raise ZeroDivisionError("above") from cause

    with pytest.raises(ZeroDivisionError) as raised:
        async with task_group() as tasks:
            tasks.start_soon(translate)
    assert raised.value.__cause__ is cause


async def test_groups_inside_groups_are_opened() -> None:
    with pytest.raises(ZeroDivisionError):
        async with task_group() as tasks:
            tasks.start_soon(fail, ExceptionGroup("", [ExceptionGroup("", [ZeroDivisionError()])]))


async def test_a_failure_cancels_the_other_tasks() -> None:
    ended = anyio.Event()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    with anyio.fail_after(5), pytest.raises(ZeroDivisionError):
        await fail_beside(wait, ZeroDivisionError())
    assert ended.is_set()


async def test_being_cancelled_is_no_failure() -> None:
    with anyio.CancelScope() as scope:
        async with task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            scope.cancel()
            await anyio.sleep_forever()

    assert scope.cancelled_caught


async def test_tasks_that_end_well_raise_nothing() -> None:
    done: list[int] = []

    async def note(number: int) -> None:
        done.append(number)

    async with task_group() as tasks:
        for number in range(3):
            tasks.start_soon(note, number)

    assert sorted(done) == [0, 1, 2]
