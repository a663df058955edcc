"""Markdown tables, as the tools print them and put them into the docs."""

from __future__ import annotations

from pathlib import Path
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


def split_page(path: Path, start: str, end: str) -> tuple[str, str]:
    """Return a page up to its line ``start``, and from its line ``end`` on.

    Raises:
        ValueError: If the page has not exactly one pair of these lines.
    """
    page = path.read_text(encoding='utf-8') if path.is_file() else ''
    if (
        page.count(start) != 1
        or page.count(end) != 1
        or page.find(end) < page.find(start)
    ):
        raise ValueError(
            f'--update {path}: expected one line {start!r} and after it one line '
            f'{end!r}, got {page.count(start)} and {page.count(end)}; put both there, '
            'the table will stand between them'
        )
    return page[: page.find(start) + len(start)], page[page.find(end) :]


def update_page(path: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between two lines of a page.

    Raises:
        ValueError: If the page has not exactly one pair of these lines.
    """
    head, tail = split_page(path, start, end)
    path.write_text(f'{head}\n\n{text}\n\n{tail}', encoding='utf-8')
