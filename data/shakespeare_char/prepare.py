"""Shakespeare, one token a character: `python data/shakespeare_char/prepare.py`, about a second and 1 MB."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import SPLITS, CorpusWriter, report
from data.files import decode_utf8, describe, download, read_bytes
from training.errors import BadInput, command

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90% of the text


def characters(parts):
    """What meta.json says of the tokens, the sorted characters of the text, and each part as indices into them."""
    codes, ids = np.unique(np.frombuffer("".join(parts).encode("utf-32-le"), "<u4"), return_inverse=True)
    if len(codes) > 256:
        raise BadInput(f"the text has {len(codes)} different characters; a token of one byte can tell 256 apart")
    alphabet = "".join(map(chr, codes))
    about = {"tokenizer": "characters", "alphabet": alphabet, "vocab_size": len(alphabet), "dtype": "uint8"}
    return about, np.split(ids, [len(parts[0])])


def prepare(argv, text, folder, tokenise):
    """The command of a folder's prepare.py, `text` its help; tokenise(parts): as `characters`."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--input", metavar="PATH", help="a local text file to use instead of the download")
    parser.add_argument("--out", metavar="DIR", default=folder, help="where the files go")
    args = parser.parse_args(argv)

    content = read_bytes(args.input) if args.input else download(URL)
    source = describe(args.input) if args.input else {"url": URL}
    text = decode_utf8(content, args.input or URL)
    cut = int(len(text) * TRAIN_SHARE)
    about, splits = tokenise([text[:cut], text[cut:]])
    with CorpusWriter(args.out, {"name": folder.name, **about, "source": source}) as writer:
        for split, ids in zip(SPLITS, splits, strict=True):
            writer.add(split, ids, documents=0)
        report(args.out, writer.finish())


@command
def main(argv=None):
    prepare(argv, __doc__, Path(__file__).parent, characters)


if __name__ == "__main__":
    main()
