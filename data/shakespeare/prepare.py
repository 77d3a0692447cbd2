"""Shakespeare in GPT-2 tokens, to fine-tune its models: `python data/shakespeare/prepare.py`, seconds and some MB."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import GPT2, gpt2_encoding
from data.shakespeare_char.prepare import prepare
from training.errors import command


def bpe(parts):
    """What meta.json says of GPT-2's tokens, and those of each part."""
    encoding = gpt2_encoding()
    return GPT2, [encoding.encode_ordinary(part) for part in parts]


@command
def main(argv=None):
    prepare(argv, __doc__, Path(__file__).parent, bpe)


if __name__ == "__main__":
    main()
