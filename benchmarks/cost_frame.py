"""The frame of the tables of cost: of a base case, one size is changed at a time."""

from collections.abc import Callable, Mapping, Sequence

from dichroic.runtime.tables import text_table


def print_costs(
    curves: Mapping[str, Sequence[int]],
    columns: Sequence[str],
    measure: Callable[[str, int], list[str]],
) -> None:
    """One line for each value of each size in `curves`, as it is measured, and all of them as a table."""
    rows = []
    for name, values in curves.items():
        for value in values:
            rows.append([name, value, *measure(name, value)])
            print(*rows[-1], flush=True)
    print("\n" + text_table(["changed", "to", *columns], rows))
