"""Shakespeare, one token a character: `python data/shakespeare_char/prepare.py`, about a second and 1 MB."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import documents
from data.corpus import CorpusWriter, report
from data.files import decode, download, output_folder
from training.errors import BadInput, command

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90% of the text


def count(pieces):
    """(alphabet, length) of a text: its sorted characters, and how many there are."""
    characters, length = set(), 0
    for piece in pieces:
        characters.update(piece)
        length += len(piece)
    if len(characters) > 256:
        raise BadInput(f"the text has {len(characters)} different characters; a token of one byte can tell 256 apart")
    return "".join(sorted(characters)), length


def write(writer, alphabet, pieces, train):
    """The text as indices into its alphabet, the first `train` characters into one split, the rest into the other."""
    codes = np.frombuffer(alphabet.encode("utf-32-le"), "<u4")
    for piece in pieces:
        ids = np.searchsorted(codes, np.frombuffer(piece.encode("utf-32-le"), "<u4"))
        writer.add("train", ids[:train], documents=0)
        writer.add("val", ids[train:], documents=0)
        train = max(0, train - len(ids))
    return writer.finish()


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    documents.add_arguments(parser)
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the files go")
    args = parser.parse_args(argv)
    out = output_folder(args.out)

    with documents.opened(args.input or [], out) as sources:
        text = [] if sources else [decode(download(URL), URL)]

        def pieces():
            return documents.read_text(sources, args.text_key) if sources else text

        alphabet, length = count(pieces())
        about = {"name": "shakespeare_char", "tokenizer": "characters", "alphabet": alphabet}
        about |= {"vocab_size": len(alphabet), "dtype": "uint8"}
        about["source"] = {"files": documents.describe(sources, args.text_key)} if sources else {"url": URL}
        with CorpusWriter(out, about) as writer:
            report(out, write(writer, alphabet, pieces(), int(length * TRAIN_SHARE)))


if __name__ == "__main__":
    main()
