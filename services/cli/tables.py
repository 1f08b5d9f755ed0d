"""How tables look in a terminal. Imports nothing of a stack: a hospital's image has these commands too."""

from rich import box
from rich.table import Table


def make_table(*columns: str) -> Table:
    """A table with little between its columns, whose cells wrap in a narrow terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
