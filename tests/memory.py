"""Measures the memory that Python allocates."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

# In bytes. A new table for 44,000 strings has 961,000. A list grows in smaller steps.
TABLE_SIZE = 500_000
MOST_STRINGS = 1_000_000  # more than the table of any run of tests takes before it is replaced


@contextmanager
def traced_memory() -> Iterator[None]:
    """Trace the allocations inside the block with `tracemalloc`.

    Python keeps all interned strings (names, parts of paths) in one table. When the table is full,
    Python replaces it in one step, and after a long run of tests the new one takes 3.8 MB. So force
    that replacement first: the new table has room for as many strings again.
    """
    replace_table_of_strings()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def replace_table_of_strings() -> None:
    strings = []
    tracemalloc.start()
    try:
        for number in range(MOST_STRINGS):
            before = tracemalloc.get_traced_memory()[0]
            strings.append(sys.intern(f"room for names {number}"))
            if tracemalloc.get_traced_memory()[0] > before + TABLE_SIZE:
                return
    finally:
        tracemalloc.stop()
    raise AssertionError("Python's table of interned strings was not replaced")
