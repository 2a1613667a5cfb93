"""Tables of which no number and no name is broken, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

BORDERS = 3  # of a column: a line and two spaces
LEAST_WORDS = 24  # narrower than this, words are no pleasure to read


@dataclass
class Sheet:
    """A table, before it is known how wide it may be.

    Attributes:
        title: its title.
        heads: the columns' heads; the first column says what a row is.
        rows: the cells.
        left: how many columns hold text.
        words: whether the last column holds words, which may go on in the next line.
        ends: below which rows there is a line.
    """

    title: str
    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1
    words: bool = False
    ends: set[int] = field(default_factory=set)

    def add(self, *cells: str, end: bool = False) -> None:
        """Add a row.

        Args:
            cells: its cells.
            end: whether there is a line below it.
        """
        if end:
            self.ends.add(len(self.rows))
        self.rows.append(list(cells))

    def fitting(self, width: int | None) -> list[Table]:
        """Return tables that fit, one below the other, each with the first column.

        Args:
            width: how many characters there are; ``None`` for any number.

        Returns:
            The tables; only one if it fits.
        """
        widths = [self._width(column) + BORDERS for column in range(len(self.heads))]
        if width is None or sum(widths) < width:
            return [self._table(list(range(len(widths))))]
        others = [*widths[1:-1], min(widths[-1], LEAST_WORDS + BORDERS)] if self.words else widths[1:]
        first = min(widths[0], max(width - 1 - max(others, default=0), width // 3))
        parts: list[list[int]] = []
        room = 0
        for column in range(1, len(widths)):
            words = self.words and column == len(widths) - 1
            if not parts or (min(widths[column], LEAST_WORDS + BORDERS) if words else widths[column]) > room:
                parts.append([0])
                room = width - 1 - first
            parts[-1].append(column)
            room -= widths[column]
        return [self._table(columns, width, first) for columns in parts or [[0]]]

    def _width(self, column: int) -> int:
        texts = [self.heads[column], *(row[column] for row in self.rows)]
        return max(cell_len(line) for text in texts for line in text.split("\n"))

    def _table(self, columns: Sequence[int], width: int | None = None, first: int | None = None) -> Table:
        """Return a table of some columns, the first as wide as told, the words as wide as there is room."""
        table = Table()
        taken = 1
        for column in columns:
            natural = self._width(column)
            words = self.words and column == len(self.heads) - 1
            if column == 0 and first is not None:
                natural = first - BORDERS
            elif width is not None:
                natural = max(1, min(natural, width - taken - BORDERS))
            taken += natural + BORDERS
            table.add_column(
                Text(self.heads[column]),
                justify="left" if column < self.left or words else "right",
                overflow="fold",
                width=natural,
            )
        for number, row in enumerate(self.rows):
            # As it is: names may hold what rich reads as a style.
            table.add_row(*(Text(row[column]) for column in columns), end_section=number in self.ends)
        table.width = taken
        return table
