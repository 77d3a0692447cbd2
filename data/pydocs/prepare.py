"""Python's own standard library as a corpus, without a download: `python data/pydocs/prepare.py`, a few seconds.

The documents are the language's help topics (`pydoc_data`) and the sources of the running Python's standard library.
"""

import argparse
import os
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import CHARACTERS, TYPOGRAPHY, CorpusWriter, drawn_for_val, encode_symbols, report
from data.files import output_folder
from training.errors import BadInput, command

SEED = 2357
VAL_FRACTION = 0.1
# Other projects' packages, tests, demos, generated tables, the topics' own file, and files that name the build machine.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__phello__"}
LEFT_OUT |= {"encodings", "topics.py"}
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


def find_documents(stdlib):
    """(name, text) of every help topic, then of every source file, sorted by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].translate(TYPOGRAPHY)
    names = []
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = filter(belongs, subfolders)
        paths = (Path(folder) / file for file in files if file.endswith(".py") and belongs(file))
        names += [path.relative_to(stdlib).as_posix() for path in paths]
    for name in sorted(names):
        text = (stdlib / name).read_bytes().decode("utf-8", "replace")
        if text.strip():
            yield name, text


def belongs(name):
    return name not in LEFT_OUT and not name.startswith(LEFT_OUT_PREFIXES)


def clean(text):
    """Line ends as "\\n", tabs as spaces, no page breaks, a newline at the end."""
    text = text.replace("\r\n", "\n").replace("\f", "").expandtabs()
    return text if text.endswith("\n") else text + "\n"


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the files go")
    args = parser.parse_args(argv)
    out = output_folder(args.out)

    stdlib = Path(sysconfig.get_path("stdlib"))
    if not stdlib.is_dir():
        raise BadInput(f"this Python keeps no sources at {stdlib}; use data/shakespeare_char/prepare.py instead")
    about = {"name": "pydocs", **CHARACTERS, "source": {"python": platform.python_version()}}
    with CorpusWriter(out, about) as writer:
        for name, text in find_documents(stdlib):
            ids = encode_symbols(text := clean(text))
            if ids is None:
                print(f"dropped, has other characters: {name}")
                writer.drop(text)
            else:
                writer.add("val" if drawn_for_val(SEED, name, VAL_FRACTION) else "train", ids)
        report(out, writer.finish())


if __name__ == "__main__":
    main()
