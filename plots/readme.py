"""Fill the tables of README.md and of the pages in results/ from the records, or check that they are what those say.

    python plots/readme.py              rewrite the blocks
    python plots/readme.py --check      exit with status 1 and name the blocks that differ

A block begins with <!-- plots/NAME.py ARGUMENTS --> and ends with <!-- end -->: between them stands what that command
prints. Patterns in the arguments are expanded as a shell does. A block that begins with <!-- if recorded: plots/.. -->
says that its runs are not there yet until they are.
"""

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plots.records import plain_arguments  # noqa: E402
from training.errors import BadInput, command  # noqa: E402

PAGES = ("demo", "icl_regression", "language_modeling", "time_series", "bench", "hf")
FILES = ("README.md", "results/README.md", *(f"results/{page}/README.md" for page in PAGES))
BLOCK = re.compile(r"(<!-- (if recorded: )?plots/(\w+)\.py (.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
PENDING = "*No such run is recorded yet.*"


def filled(text):
    """(the text with every block as the records have it, the commands of the blocks that were different)."""
    changed = []

    def fill(block):
        start, pending, name, arguments, there, end = block.groups()
        printed = output(name, arguments, bool(pending))
        if printed != there:
            changed.append(f"plots/{name}.py {' '.join(arguments.split())}")
        return start + printed + end

    return BLOCK.sub(fill, text), changed


def output(name, arguments, pending):
    """What a command of plots/ prints, between empty lines. `pending`: PENDING where it finds no runs."""
    main = importlib.import_module(f"plots.{name}").main
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            main.__wrapped__(expanded(arguments))
        except BadInput:
            if not pending:
                raise
            return f"\n{PENDING}\n\n"
    return f"\n{printed.getvalue().strip()}\n\n"


def expanded(arguments):
    """The words of a command line, patterns of paths replaced by the paths that match, sorted."""
    words = []
    for word in shlex.split(arguments):
        is_pattern = word.startswith("results/") and any(sign in word for sign in "*?[")
        words += sorted(map(str, Path().glob(word))) if is_pattern else [word]
    return words


@command
def main(argv=None):
    parser = plain_arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block differs")
    args = parser.parse_args(argv)
    different = []
    with contextlib.chdir(ROOT):
        for path in map(Path, FILES):
            text, changed = filled(path.read_text())
            different += [f"{path}: {words}" for words in changed]
            if changed and not args.check:
                path.write_text(text)
    for words in different:
        print(words)
    if args.check and different:
        sys.exit(1)


if __name__ == "__main__":
    main()
