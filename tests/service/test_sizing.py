"""Chunks grow while larger ones cost less a row, and shrink where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, pairwise

import pytest

from service.sizing import FEWEST_ROWS, FIRST_ROWS, ChunkSize, Cost

MIB = 2**20
ROW_BYTES = 100


def calls(seconds: float, waits: float = 0) -> Cost:
    """A call that takes so long on a core, and waits besides."""
    return Cost(seconds + waits, seconds)


def settled(
    cost: Callable[[int], float], *, row_bytes: int = ROW_BYTES, most_bytes: int = 100 * MIB
) -> int:
    """The rows of a chunk in the end, where a call of so many rows takes `cost` seconds."""
    sizes = ChunkSize(most_bytes=most_bytes)
    for _ in range(100):
        sizes.learn(sizes.rows, calls(cost(sizes.rows)), sizes.rows * row_bytes)
    return sizes.rows


def test_a_cost_that_each_call_has_makes_chunks_grow_until_it_hardly_counts() -> None:
    fixed, per_row = 0.02, 1e-6

    rows = settled(lambda rows: fixed + per_row * rows)

    # What a row costs more than in an endless chunk; with half the rows it would be twice that.
    assert 0.05 < fixed / rows / per_row < 0.1


def test_where_each_row_costs_the_same_chunks_stay_as_they_begin() -> None:
    assert settled(lambda rows: 1e-4 * rows) == FIRST_ROWS


def test_a_chunk_is_not_so_small_that_what_it_costs_beside_the_call_would_count() -> None:
    rows = settled(lambda rows: 1e-6 * rows)

    assert 0.1 < 1e-6 * rows < 0.4


@pytest.mark.parametrize("per_row", [1e-8, 1e-6, 1e-5])
def test_while_calls_are_short_chunks_grow_with_each_and_not_beyond(per_row: float) -> None:
    sizes, asked = ChunkSize(most_bytes=100 * MIB), {}
    while not sizes.settled and per_row * sizes.rows < 0.1:
        asked[sizes.rows] = asked.get(sizes.rows, 0) + 1
        sizes.learn(sizes.rows, calls(per_row * sizes.rows), sizes.rows * ROW_BYTES)

    *grown, _ = asked
    assert len(grown) <= 3
    assert all(asked[rows] == 1 for rows in grown)
    assert all(2 * one <= next_one <= 8 * one for one, next_one in pairwise(asked))
    assert per_row * sizes.rows <= 0.2
    assert sizes.rows * ROW_BYTES <= 100 * MIB


def test_a_core_that_slows_down_for_a_while_does_not_end_the_growth() -> None:
    def cost(rows: int) -> float:
        busy = 1.5 if rows == 4 * FIRST_ROWS else 1
        return busy * (0.2 + 1e-6 * rows)

    assert settled(cost) == settled(lambda rows: 0.2 + 1e-6 * rows) > 4 * FIRST_ROWS


def test_a_size_that_was_tried_and_is_no_better_is_not_kept() -> None:
    assert settled(lambda rows: 1e-4 * rows, most_bytes=3 * FIRST_ROWS * ROW_BYTES) == FIRST_ROWS


def test_a_call_does_not_take_longer_than_a_caller_would_wait_for_progress() -> None:
    slow = settled(lambda rows: 0.16 + 1e-6 * rows)

    assert 0.5 < 0.16 + 1e-6 * slow <= 1


@pytest.mark.parametrize("row_bytes", [100, 10_000])
def test_chunks_hold_no_more_bytes_than_they_may(row_bytes: int) -> None:
    rows = settled(lambda rows: 0.01 + 1e-9 * rows, row_bytes=row_bytes, most_bytes=64 * MIB)

    assert rows * row_bytes <= 64 * MIB < 2 * rows * row_bytes


def test_time_that_a_call_waits_for_a_core_says_nothing_of_its_rows() -> None:
    sizes, waits = ChunkSize(most_bytes=100 * MIB), cycle([0.0, 0.4, 0.2])
    for _ in range(100):
        cost = calls(0.2 + 1e-6 * sizes.rows, next(waits))
        sizes.learn(sizes.rows, cost, sizes.rows * ROW_BYTES)

    assert sizes.rows == settled(lambda rows: 0.2 + 1e-6 * rows) > FIRST_ROWS


@pytest.mark.parametrize("fixed", [0.02, 0.2])
def test_one_call_that_waits_long_does_not_end_the_growth(fixed: float) -> None:
    sizes, waits = ChunkSize(most_bytes=100 * MIB), cycle([0.0, 2.0, 0.0, 2.0, 2.0])
    for _ in range(100):
        cost = calls(fixed + 1e-6 * sizes.rows, next(waits))
        sizes.learn(sizes.rows, cost, sizes.rows * ROW_BYTES)

    assert sizes.rows == settled(lambda rows: fixed + 1e-6 * rows) > FIRST_ROWS


def test_one_slow_call_on_a_busy_machine_does_not_decide() -> None:
    sizes = ChunkSize(most_bytes=100 * MIB)
    for call in range(100):
        busy = 0.3 if call % 3 else 0
        seconds = busy + 0.2 + 1e-6 * sizes.rows
        sizes.learn(sizes.rows, calls(seconds), sizes.rows * ROW_BYTES)

    assert sizes.rows == settled(lambda rows: 0.2 + 1e-6 * rows)


def test_a_last_short_chunk_and_those_of_another_size_are_not_judged() -> None:
    sizes = ChunkSize(most_bytes=MIB)
    for _ in range(10):
        sizes.learn(FIRST_ROWS // 2, calls(10), 10)

    assert sizes.rows == FIRST_ROWS


def test_rows_that_the_caller_asked_for_are_what_a_call_gets() -> None:
    sizes = ChunkSize(7, most_bytes=1)
    for _ in range(10):
        sizes.learn(7, calls(10), 100)

    assert sizes.rows == 7


@pytest.mark.parametrize("asked", [None, 1000])
def test_for_want_of_memory_chunks_are_halved_down_to_the_fewest_rows(asked: int | None) -> None:
    sizes = ChunkSize(asked, most_bytes=MIB)
    before = sizes.rows

    assert sizes.shrink()
    assert sizes.rows == before // 2
    while sizes.shrink():
        sizes.learn(sizes.rows, calls(1e-9), 1)  # They do not grow again.
    assert sizes.rows == FEWEST_ROWS
