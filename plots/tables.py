"""Tables as text: those that a figure prints beside it, and those of the pages of results/, in Markdown."""

import statistics
import textwrap

import pandas as pd
from scipy.stats import ttest_1samp


def show(*tables, words=""):
    """Print tables in Markdown, each a list of rows that begins with its header, then a paragraph of words, wrapped."""
    print("\n\n".join(markdown(*rows) for rows in tables if rows))
    if words:
        print("\n" + wrapped(words))


def markdown(header, *rows):
    """One such table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def columns(header, *rows):
    """Text columns; the first flushes left."""
    table = pd.DataFrame(rows, columns=header, dtype=str).set_index(header[0])
    return table.rename_axis(index=None, columns=header[0]).to_string()


def wrapped(text):
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def within(low, high, form=".3f"):
    """An interval in words: [0.010, 0.020]."""
    return f"[{low:{form}}, {high:{form}}]"


def student(values):
    """(mean, lowest, highest, p) of Student's t for the mean of differences; of fewer than 3 the mean, then None."""
    if len(values) < 3:
        return statistics.fmean(values), None, None, None
    test = ttest_1samp(values, 0)
    return statistics.fmean(values), *test.confidence_interval(), test.pvalue


def hours_words(runs):
    """How many runs are behind a table, and their time."""
    return f"{len(runs)} runs, {sum(run.seconds for run in runs) / 3600:.1f} hours of training."


def final_table(curves, y, x="step"):
    """The last point of every curve: its seeds, its step, where it is on the x axis, its mean and its extremes.

    Where the learning rate was chosen: the rate, and those it was chosen from.
    """
    rows = []
    for c in curves:
        tried = dict(lr=f"{min(c.tried, key=c.tried.get):g}", of=" ".join(f"{r:g}" for r in c.tried)) if c.tried else {}
        row = dict(curve=c.label, runs=len(c.runs), seeds=" ".join(map(str, c.seeds)), **tried, step=f"{c.steps[-1]:,}")
        row |= {} if x == "step" else {x: f"{c.x[-1]:.4g}"}
        rows.append(row | {name: f"{v[-1]:.4g}" for name, v in ((y, c.mean), ("lowest", c.low), ("highest", c.high))})
    return columns(list(rows[0]), *(row.values() for row in rows))
