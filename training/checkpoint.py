"""Checkpoints on disk: written whole or not at all, read as plain types and tensors."""

import zipfile
from pathlib import Path

import torch

from training.errors import BadInput
from training.files import replacing


def save_atomic(state, path):
    """Save, or leave the old file as it was. Raises OSError where the system refuses to write."""
    with replacing(path) as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # why a write failed, which torch's own error does not say
                raise error.__context__ from None
            raise


def load_checkpoint(path, map_location="cpu"):
    """A checkpoint's dict, plain types and tensors only. Raises BadInput if it is missing, damaged or foreign.

    Every byte is compared with the checksums of the file, which torch writes and does not read (1 s for some GB).
    """
    if not Path(path).is_file():
        raise BadInput(f"no checkpoint {path}; make the run that writes it, with its --out_dir={Path(path).parent}")
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        state = None if damaged else torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        why = f"({type(error).__name__}): truncated or of another kind"
        raise BadInput(f"{path} cannot be read as a checkpoint {why}") from None
    if damaged:
        raise BadInput(f"{path} is damaged: its part {damaged} is not what was written")
    if not isinstance(state, dict) or not {"settings", "step", "model"} <= state.keys():
        raise BadInput(f"{path} is not a checkpoint of this project: it has no settings, step and model")
    for name, kind in dict(settings=dict, step=int, model=dict).items():
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise BadInput(f"{path}: its {name} is {type(state[name]).__name__}, it must be {kind.__name__}")
    return state


CHOICES = ("last", "best", "auto")  # which of a run's two checkpoints


def load_run(folder, script, mark, which="last"):
    """(checkpoint, its path) of a run of `script`, whose checkpoints or their settings alone have a `mark`.

    which: last (ckpt.pt), best (best.pt), or auto: the best of a run that was to keep the best alone, else the last.
    Raises BadInput for another choice, for a run of another script and as `load_checkpoint`.
    """
    if which not in CHOICES:
        raise BadInput(f"checkpoint is '{which}', there are {', '.join(CHOICES)}")
    path = Path(folder) / ("best.pt" if which == "best" else "ckpt.pt")
    saved = load_checkpoint(path)
    if mark not in saved and mark not in saved["settings"]:
        raise BadInput(f"{path} is no run of {script}: it names no {mark}")
    kept_alone = saved["settings"].get("always_save_checkpoint") is False and path.with_name("best.pt").exists()
    if which == "auto" and kept_alone:
        return load_run(folder, script, mark, "best")
    return saved, path


def load_weights(model, weights, path):
    """Put saved weights into a model; raises BadInput naming the first that does not fit."""
    want = model.state_dict()
    for name in [*want, *weights]:
        if name not in weights or name not in want or weights[name].shape != want[name].shape:
            shapes = [str(tuple(s[name].shape)) if name in s else "nothing" for s in (weights, want)]
            raise BadInput(f"{path}: the checkpoint has {shapes[0]} for {name}, the model {shapes[1]}")
    model.load_state_dict(weights)
