"""Tables as text: those that a figure prints beside it, and those of the pages of results/, in Markdown."""

import textwrap


def show(*tables, words=""):
    """Print tables in Markdown, each a list of rows that begins with its header, then a paragraph of words, wrapped."""
    print("\n\n".join(markdown(*rows) for rows in tables if rows))
    if words:
        print("\n" + wrapped(words))


def markdown(header, *rows):
    """One such table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def columns(header, rows):
    """Text columns, each as wide as its widest entry; the first flushes left."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def wrapped(text):
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def within(low, high, form=".3f"):
    """An interval in words: [0.010, 0.020]."""
    return f"[{low:{form}}, {high:{form}}]"


def listed(words):
    """a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def hours_words(runs, at_step=None):
    """How many runs are behind a table, and their time."""
    until = "" if at_step is None else f" until step {at_step:,}"
    return f"{len(runs)} runs, {sum(run.seconds for run in runs) / 3600:.1f} hours of training{until}."


def final_table(curves, y, x="step"):
    """The last point of every curve: its seeds, its step, where it is on the x axis, its mean and its extremes.

    Where the learning rate was chosen: the rate, and those it was chosen from.
    """
    rates = ["lr", "of"] if all(c.tried for c in curves) else []
    header = ["curve", "runs", "seeds", *rates, "step", *([] if x == "step" else [x]), y, "lowest", "highest"]
    rows = []
    for c in curves:
        chosen = [f"{c.rate:g}", " ".join(f"{rate:g}" for rate in c.tried)] if rates else []
        numbers = [f"{v[-1]:.4g}" for v in (c.mean, c.low, c.high)]
        at = [] if x == "step" else [f"{c.x[-1]:.4g}"]
        rows.append(
            [c.label, str(len(c.runs)), " ".join(map(str, c.seeds)), *chosen, f"{c.steps[-1]:,}", *at, *numbers]
        )
    return columns(header, rows)
