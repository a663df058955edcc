"""Markdown tables, as the tools print them and the docs show them."""

from __future__ import annotations

from typing import Collection, Iterable, Sequence


def markdown_row(cells: Iterable[object]) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def markdown_table(
    rows: Sequence[Sequence[object]], text_columns: Collection[int] = (0,)
) -> str:
    """Return a table whose columns are numbers, aligned right, but for some.

    Args:
        rows: The cells, those of the head first.
        text_columns: Indices of the columns that hold text.
    """
    head, *body = rows
    rule = ['---' if i in text_columns else '---:' for i in range(len(head))]
    return '\n'.join(map(markdown_row, (head, rule, *body)))
