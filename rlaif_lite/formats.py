"""Figures and tables as people read them."""

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 14 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes in powers of 1000: 840 kB, 12.3 MB, 1.46 GB."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    if count < 1e9:
        return f"{count / 1e6:.{1 if count < 1e8 else 0}f} MB"
    return f"{count / 1e9:.2f} GB"


def percent(share: float) -> str:
    """A share in per cent, with a no-break space."""
    return f"{100 * share:.1f}\u00a0%"


def number(value: float, digits: int = 2) -> str:
    """With thousands, a true minus sign, and no sign on what rounds to zero."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, + included; none on what rounds to zero."""
    text = number(value, digits)
    return text if text.startswith("−") or not text.strip("0.") else f"+{text}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a Markdown table; a bar in a cell becomes a slash."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def aligned(rows: Sequence[Sequence[str]], texts: int = 2) -> str:
    """Cells in columns, the first `texts` of them on the left and numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    places = [str.ljust] * texts + [str.rjust] * (len(widths) - texts)
    lines = ("  ".join(map(lambda put, cell, width: put(cell, width), places, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
