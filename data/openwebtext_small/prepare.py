"""OpenWebText in 96 symbols, one byte a character: `python data/openwebtext_small/prepare.py`.

Documents with a character other than newline and ASCII 32 to 126 are dropped; each kept one ends with a newline.
After a kill, the same command goes on from there, and ends with the same bytes.
"""

import argparse
import itertools
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import hub
from data.corpus import CHARACTERS, CorpusWriter, complete, drawn_for_val, encode_symbols, report
from data.files import describe, read_documents
from training.errors import BadInput, command

SEED = 2357


class LocalText:
    """Documents of local files as (split, text); split None leaves it to the draw."""

    total = None  # unknown before reading

    def __init__(self, train, val):
        self.files = [("train" if val else None, path) for path in train] + [("val", path) for path in val]

    def documents(self, start, position):
        every = ((split, text) for split, path in self.files for text in read_documents([path]))
        return itertools.islice(every, start, None)

    def position(self):
        return None  # the count of documents is enough


class HubText:
    """Documents of the hub's OpenWebText, a streamed dataset with the column "text", as (None, text)."""

    total = hub.DOCUMENTS

    def __init__(self, dataset):
        self.dataset = dataset

    def documents(self, start, position):
        if position is not None:
            self.dataset.load_state_dict(position)
        count = start
        try:
            for count, row in enumerate(self.dataset, start + 1):  # noqa: B007 (the count is used below)
                yield None, row["text"] if row["text"].endswith("\n") else row["text"] + "\n"
        except Exception as error:  # datasets, huggingface_hub, fsspec and the HTTP client each raise their own
            # Not BadInput, which throws away what was written: here it is good, and stays for the next run.
            sys.exit(f"error: the hub broke off after {count:,} documents ({error}); give the same command to go on")
        hub.check_count(count)

    def position(self):
        return self.dataset.state_dict()


def write(writer, source, val_fraction):
    """Encode every document that a killed run has not, each into its split."""
    start = sum(writer.documents.values())
    if start:
        print(f"going on after {start:,} documents")
    documents = source.documents(start, writer.position)
    bar = tqdm(documents, initial=start, total=source.total, unit=" documents", mininterval=1)
    for number, (split, text) in enumerate(bar, start):
        ids = encode_symbols(text)
        if ids is None:
            writer.drop()
        else:
            writer.add(split or ("val" if drawn_for_val(SEED, number, val_fraction) else "train"), ids)
        if writer.checkpoint_due:
            writer.checkpoint(source.position())
    return writer.finish()


def describe_source(args):
    """What meta.json says of the source, and what a run must share with a killed one to go on from it."""
    if args.val:
        return {"train": [describe(path) for path in args.input], "val": [describe(path) for path in args.val]}
    source = {"files": [describe(path) for path in args.input]} if args.input else hub.SOURCE
    return {**source, "seed": SEED, "val_fraction": args.val_fraction}


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", metavar="PATH", help="local text or .xz, empty lines between documents")
    parser.add_argument("--val", nargs="+", metavar="PATH", help="local validation text; --input is then all train")
    parser.add_argument("--val_fraction", type=float, default=0.0005, help="share of documents drawn without --val")
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the files go")
    args = parser.parse_args(argv)
    if args.val and not args.input:
        raise BadInput("--val goes with --input: the hub's text has its val split drawn from it")
    if not 0 < args.val_fraction < 1:
        raise BadInput(f"--val_fraction is a share between 0 and 1, got {args.val_fraction}")

    about = {"name": "openwebtext_small", **CHARACTERS, "source": describe_source(args)}
    if complete(args.out, about):
        print(f"{args.out} is complete already; delete its meta.json to make it again")
        return
    source = LocalText(args.input, args.val or []) if args.input else HubText(hub.open_openwebtext(streaming=True))
    with CorpusWriter(args.out, about) as writer:
        report(args.out, write(writer, source, args.val_fraction))


if __name__ == "__main__":
    main()
