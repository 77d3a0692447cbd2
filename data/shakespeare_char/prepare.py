"""Shakespeare, one token a character: `python data/shakespeare_char/prepare.py`, about a second and 1 MB."""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import CorpusWriter, report
from data.files import decode_utf8, describe, download, read_bytes
from training.errors import BadInput, command

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90% of the text


def tokenise(text):
    """(alphabet, ids): the sorted characters of the text, and the text as indices into them."""
    codes, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    if len(codes) > 256:
        raise BadInput(f"the text has {len(codes)} different characters; a token of one byte can tell 256 apart")
    return "".join(map(chr, codes)), ids


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", metavar="PATH", help="a local text file to use instead of the download")
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the files go")
    args = parser.parse_args(argv)

    content = read_bytes(args.input) if args.input else download(URL)
    source = describe(args.input) if args.input else {"url": URL}
    alphabet, ids = tokenise(decode_utf8(content, args.input or URL))
    about = {"name": "shakespeare_char", "tokenizer": "characters", "alphabet": alphabet}
    about |= {"vocab_size": len(alphabet), "dtype": "uint8", "source": source}

    cut = int(len(ids) * TRAIN_SHARE)
    with CorpusWriter(args.out, about) as writer:
        writer.add("train", ids[:cut], documents=0)
        writer.add("val", ids[cut:], documents=0)
        report(args.out, writer.finish())


if __name__ == "__main__":
    main()
