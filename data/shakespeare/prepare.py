"""Shakespeare in GPT-2 tokens, to fine-tune its models: `python data/shakespeare/prepare.py`, seconds and some MB."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import documents
from data.corpus import GPT2, SPLITS, CorpusWriter, gpt2_encoding, report
from data.files import decode, download, output_folder
from data.shakespeare_char.prepare import TRAIN_SHARE, URL
from training.errors import command


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    documents.add_arguments(parser)
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the files go")
    args = parser.parse_args(argv)
    out, encoding = output_folder(args.out), gpt2_encoding()

    with documents.opened(args.input or [], out) as sources:
        text = "".join(documents.read_text(sources, args.text_key)) if sources else decode(download(URL), URL)
        source = {"files": documents.describe(sources, args.text_key)} if sources else {"url": URL}
        cut = int(len(text) * TRAIN_SHARE)
        with CorpusWriter(out, {"name": "shakespeare", **GPT2, "source": source}) as writer:
            for split, part in zip(SPLITS, (text[:cut], text[cut:]), strict=True):
                writer.add(split, encoding.encode_ordinary(part), documents=0)
            report(out, writer.finish())


if __name__ == "__main__":
    main()
