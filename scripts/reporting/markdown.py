"""The one way in which tables are printed here."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose columns are aligned in plain text, too: the first `left` ones at the left."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    adjust = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    text = [
        f"| {' | '.join(f(cell, w) for f, cell, w in zip(adjust, line, widths, strict=True))} |"
        for line in lines
    ]
    return "\n".join([text[0], f"|{'|'.join(rule)}|", *text[1:]])
