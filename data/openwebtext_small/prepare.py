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

from data import documents, hub
from data.corpus import CHARACTERS, CorpusWriter, complete, drawn_for_val, encode_symbols, report, to_ascii
from data.files import output_folder
from training.errors import BadInput, command

SEED = 2357


class LocalText:
    """Documents of what `documents.opened` gives as (split, text); split None leaves it to the draw."""

    total = None  # unknown before reading

    def __init__(self, train, val, key):
        self.parts, self.key = (("train" if val else None, train), ("val", val)), key

    def documents(self, start, position):
        every = ((split, text) for split, part in self.parts for text in documents.read_documents(part, self.key))
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


def write(writer, source, val_fraction, ascii_only):
    """Encode every document that a killed run has not, each into its split."""
    start = sum(writer.documents.values())
    if start:
        print(f"going on after {start:,} documents")
    every = source.documents(start, writer.position)
    bar = tqdm(every, initial=start, total=source.total, unit=" documents", mininterval=1)
    for number, (split, text) in enumerate(bar, start):
        if ascii_only:
            text = to_ascii(text)
        ids = encode_symbols(text)
        if ids is None:
            writer.drop(text)
        else:
            writer.add(split or ("val" if drawn_for_val(SEED, number, val_fraction) else "train"), ids)
        if writer.checkpoint_due:
            writer.checkpoint(source.position())
    return writer.finish()


def describe_source(args, train, val):
    """What meta.json says of the source, and what a run must share with a killed one to go on from it."""
    source = {"ascii": True} if args.ascii else {}
    if val:
        parts = {"train": train, "val": val}
        return source | {split: documents.describe(part, args.text_key) for split, part in parts.items()}
    source |= {"files": documents.describe(train, args.text_key)} if train else hub.SOURCE
    return {**source, "seed": SEED, "val_fraction": args.val_fraction}


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    documents.add_arguments(parser)
    parser.add_argument("--val", nargs="+", metavar="PATH", help="local validation text; --input is then all train")
    parser.add_argument("--val_fraction", type=float, default=0.0005, help="share of documents drawn without --val")
    parser.add_argument("--ascii", action="store_true", help="write quotes, dashes, accents and tabs in ASCII first")
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the files go")
    args = parser.parse_args(argv)
    if args.val and not args.input:
        raise BadInput("--val goes with --input: the hub's text has its val split drawn from it")
    if not 0 < args.val_fraction < 1:
        raise BadInput(f"--val_fraction is a share between 0 and 1, got {args.val_fraction}")
    out = output_folder(args.out)

    with documents.opened(args.input or [], out) as train, documents.opened(args.val or [], out) as val:
        about = {"name": "openwebtext_small", **CHARACTERS, "source": describe_source(args, train, val)}
        if complete(out, about):
            print(f"{out} is complete already; delete its meta.json to make it again")
            return
        source = LocalText(train, val, args.text_key) if train else HubText(hub.open_openwebtext(streaming=True))
        with CorpusWriter(out, about) as writer:
            report(out, write(writer, source, args.val_fraction, args.ascii))


if __name__ == "__main__":
    main()
