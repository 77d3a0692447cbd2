"""Time and memory of attention, of generating text and of training steps, beside PyTorch's own attention.

    python bench.py attention
    python bench.py attention --lengths="1000|4100" --structures="MLR|window" --out=attention.json
    python bench.py decode
    python bench.py step --structures="low_rank|multi_level_low_rank" --widths=256 --batches="32x1|4x8" --compile=True
    python bench.py step --structures=low_rank --compile=True --peer=../nanoGPT
    python bench.py icl --sizes="16x128|64x256" --tf32=True

An attention function is timed only after its output and gradients agree with the float64 definition in
structured/reference.py, on inputs that differ from call to call (--seed repeats them); otherwise its row says WRONG in
place of times and the command exits with status 1. Times are medians after a warm-up. --help after a command lists its
settings; sizes not given are larger on a GPU.
"""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import attention, decode, icl, step
from benchmarks.measure import matmul_tflops
from training.configurator import configure
from training.devices import allow_tf32, device_name, pick_device
from training.errors import BadInput, command

COMMANDS = dict(attention=attention, decode=decode, icl=icl, step=step)


def line(row, columns):
    """A row as text, printed as soon as it is measured: words left, numbers right, - where there is none."""
    cells = []
    for key, form in columns.items():
        value = "-" if row.get(key) is None else row[key]
        words = isinstance(value, str) and not form.endswith("s")
        cells.append((value if words else f"{value:{form}}").rjust(max(len(key), 9)))
    return " ".join([*cells, row.get("note", "")]).rstrip()


@command
def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        raise BadInput(f"no command '{name}', there are {', '.join(COMMANDS)}")
    cls, columns = COMMANDS[name].Settings, COMMANDS[name].COLUMNS
    device = pick_device(configure(cls, argv).device)
    flags = [*(cls.ON_CUDA if device.type == "cuda" else ()), *argv]
    cfg = configure(cls, flags)
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)  # the one that the timers wait for
    allow_tf32(False)
    measured = COMMANDS[name].rows(cfg, device)
    next(measured)  # before which bad settings are refused
    header = dict(command=name, device=device_name(device), torch=torch.__version__, dtype=cfg.dtype, seed=cfg.seed)
    if device.type == "cuda":
        header["matmul_tflops"] = matmul_tflops(device)
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    print(shlex.join(["python", "bench.py", name, *flags]))
    print(line(dict(zip(columns, columns, strict=True)), columns), flush=True)
    rows = []
    for row in measured:
        rows.append(row)
        print(line(row, columns), flush=True)
        for kernel, ms, launches in row.get("kernels", ()):
            print(f"{ms:10.3f} ms {launches:6.0f} x {kernel[:90]}", flush=True)
        if cfg.out:  # after every row: a command cut short leaves what it measured
            Path(cfg.out).write_text(json.dumps(dict(**header, settings=asdict(cfg), rows=rows), indent=1) + "\n")
    if any(row.get("note", "").startswith(("WRONG", "FAILED")) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
