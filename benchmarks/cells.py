"""Numbers and rows of a Markdown table."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """Or whole numbers, however large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def listed(values: dict[str, float]) -> str:
    return "; ".join(f"{name}: {three_digits(value)}" for name, value in values.items())


def share(fraction: float | str) -> str:
    """Of the MACs or the width, in percent; 'mean' is that over a dropout list."""
    return "mean over a list" if fraction == "mean" else f"{100 * float(fraction):.3g} %"


def rows_of(columns: list[str], rows: list[list[str]], words: int) -> list[str]:
    """The lines of a table; its first `words` columns are text, the others are numbers."""
    lines = [columns, *rows]
    ruler = "|---" * words + "|--:" * (len(columns) - words) + "|"
    texts = ["| " + " | ".join(cells) + " |" for cells in lines]
    return [texts[0], ruler, *texts[1:]]
