"""The allocator's rules, one by one."""

from __future__ import annotations

import random

from pronghorn.memory.allocator import KIB, MIB, Allocator


def test_sizes_round_to_512_bytes() -> None:
    memory = Allocator()
    memory.new(1)
    memory.new(513)
    assert memory.allocated == 512 + 1024 and memory.reserved == 2 * MIB


def test_segments_by_size() -> None:
    for size, segment in (
        (MIB, 2),
        (MIB + 1, 20),
        (9 * MIB, 20),
        (10 * MIB, 10),
        (11 * MIB, 12),
        (125 * MIB, 126),
    ):
        memory = Allocator()
        memory.new(size)
        assert memory.reserved == segment * MIB, size


def test_a_freed_block_serves_the_next_request_that_fits() -> None:
    memory = Allocator()
    large = memory.new(100 * MIB)
    memory.free(large)
    memory.new(60 * MIB)
    memory.new(40 * MIB)
    assert memory.reserved == 100 * MIB and memory.peak_allocated == 100 * MIB


def test_what_is_left_of_a_large_block_is_cut_off_from_a_mebibyte_on() -> None:
    memory = Allocator()
    memory.free(memory.new(100 * MIB))
    memory.new(99 * MIB + 512 * KIB)
    assert memory.allocated == 100 * MIB


def test_neighbours_join_within_their_segment_only() -> None:
    memory = Allocator()
    first, second = memory.new(20 * MIB), memory.new(20 * MIB)
    memory.free(first, second)
    memory.new(40 * MIB)
    assert memory.reserved == 80 * MIB, "two segments are no block of both"
    memory = Allocator()
    memory.free(memory.new(40 * MIB))
    memory.free(memory.new(20 * MIB), memory.new(20 * MIB))
    memory.new(40 * MIB)
    assert memory.reserved == 40 * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    memory = Allocator()
    blocks = [memory.new(size * MIB) for size in (50, 30, 40)]
    memory.free(*blocks)
    memory.new(35 * MIB)
    memory.new(50 * MIB)
    assert memory.reserved == 120 * MIB


def test_nothing_leaks_whatever_the_order() -> None:
    memory, order = Allocator(), random.Random(0)
    live: list[int] = []
    for _ in range(5000):
        if live and order.random() < 0.5:
            memory.free(live.pop(order.randrange(len(live))))
        else:
            live.append(memory.new(order.choice((0, 100, 70_000, 3 * MIB, 17 * MIB))))
    memory.free(*live)
    assert memory.allocated == 0
    before = memory.reserved
    segments = [size for size, _ in (*memory._free[True], *memory._free[False])]
    assert sum(segments) == before, "every segment is whole again"
