"""OpenWebText on the Hugging Face hub, whole or as a stream."""

from training.errors import BadInput

NAME = "Skylion007/openwebtext"
REVISION = "refs/convert/parquet"  # the main branch is a loading script, which `datasets` 4 and later refuse
SOURCE = {"hub": NAME, "revision": REVISION}
DOCUMENTS = 8_013_769


def open_openwebtext(streaming):
    """The documents as a `datasets` dataset with the one column "text"."""
    from datasets import load_dataset

    try:
        return load_dataset(NAME, revision=REVISION, split="train", streaming=streaming)
    except Exception as error:  # datasets, huggingface_hub, fsspec and the HTTP client each raise their own
        raise BadInput(
            f"could not get {NAME} ({REVISION}) from the Hugging Face hub ({type(error).__name__}: {error}); "
            "run the same command again when it can be reached, or name local text with --input"
        ) from error


def check_count(documents):
    """BadInput if part of OpenWebText is missing: the hub converts some data sets only in part."""
    if documents < DOCUMENTS:
        raise BadInput(f"the hub gave only {documents:,} of OpenWebText's {DOCUMENTS:,} documents")
