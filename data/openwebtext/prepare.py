"""OpenWebText in GPT-2 tokens, nanoGPT's recipe: `python data/openwebtext/prepare.py`.

`datasets` keeps the download and each finished piece of the tokenisation in its cache: a killed run goes on from there.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import documents, hub
from data.corpus import GPT2, CorpusWriter, complete, gpt2_encoding, report
from data.files import output_folder
from training.errors import BadInput, command

SEED = 2357
BATCH = 1000  # documents joined before each write


def open_local(sources, key, about):
    """Local text as the same kind of dataset. `about` has the files' sha256, so that the cache knows a changed file."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    def rows():
        for text in documents.read_documents(sources, key):
            yield {"text": text}

    try:
        fingerprint = hashlib.sha256(str(about).encode()).hexdigest()
        return Dataset.from_generator(rows, features=Features({"text": Value("string")}), fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise error.__cause__ from None


def tokenise(dataset, encoding, workers):
    """A column "ids" in place of "text": GPT-2's tokens and the end-of-text token."""
    from datasets import Features, List, Value

    def encode(row):
        return {"ids": np.array([*encoding.encode_ordinary(row["text"]), encoding.eot_token], np.uint16)}

    return dataset.map(
        encode,
        remove_columns=dataset.column_names,
        features=Features({"ids": List(Value("uint16"))}),
        num_proc=workers if workers > 1 else None,
        desc="tokenising",
    )


def write(folder, dataset, about, encoding, val_fraction, workers):
    """Split whole documents at random as nanoGPT does, tokenise, and write both splits."""
    try:
        parts = dataset.train_test_split(test_size=val_fraction, seed=SEED, shuffle=True)
    except ValueError as error:  # a split would be empty
        raise BadInput(f"too few documents ({len(dataset)}) for a val split of {val_fraction}: {error}") from error
    with CorpusWriter(folder, about) as writer:
        for split, part in (("train", parts["train"]), ("val", parts["test"])):
            batches = tokenise(part, encoding, workers).with_format("numpy").iter(batch_size=BATCH)
            for batch in tqdm(batches, total=-(-len(part) // BATCH), desc=f"writing {split}", mininterval=1):
                writer.add(split, np.concatenate(list(batch["ids"])), documents=len(batch["ids"]))
        return writer.finish()


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    documents.add_arguments(parser)
    parser.add_argument("--val_fraction", type=float, default=0.0005, help="share of the documents drawn for val")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that tokenise")
    parser.add_argument("--out", metavar="DIR", default=Path(__file__).parent, help="where the files go")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise BadInput(f"--val_fraction is a share between 0 and 1, got {args.val_fraction}")
    out = output_folder(args.out)

    with documents.opened(args.input or [], out) as sources:
        source = {"files": documents.describe(sources, args.text_key)} if sources else hub.SOURCE
        about = {"name": "openwebtext", **GPT2, "source": {**source, "seed": SEED, "val_fraction": args.val_fraction}}
        if complete(out, about):
            print(f"{out} is complete already; delete its meta.json to make it again")
            return
        encoding = gpt2_encoding()
        dataset = open_local(sources, args.text_key, source) if sources else hub.open_openwebtext(streaming=False)
        if not sources:
            hub.check_count(len(dataset))
        report(out, write(out, dataset, about, encoding, args.val_fraction, args.workers))


if __name__ == "__main__":
    main()
