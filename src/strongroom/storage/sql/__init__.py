"""Code that the SQL stores share: the tables behind the declarations, the codec of rows, and queries as SQL."""

from .dialect import Convert, Dialect, Total, listed, quoted
from .queries import MAX_SHAPES, Compiler, Select, Totals
from .recent_rows import RecentRows
from .rows import JOURNAL_COLUMNS, Codec, Line, canonical, content_size, json_text, line
from .tables import describe, describe_field, index_columns, index_name

__all__ = [
    "JOURNAL_COLUMNS", "MAX_SHAPES", "Codec", "Compiler", "Convert", "Dialect", "Line", "RecentRows", "Select", "Total",
    "Totals", "canonical", "content_size", "describe", "describe_field", "index_columns", "index_name", "json_text",
    "line", "listed", "quoted",
]  # fmt: skip
