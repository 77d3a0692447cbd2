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
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import attention, decode, icl, step
from benchmarks.measure import heading, line, matmul_tflops
from training.configurator import configure
from training.devices import allow_tf32, device_name, pick_device
from training.errors import BadInput, command

COMMANDS = {  # name: (its settings, what checks them and gives a generator of rows, the columns of its table)
    "attention": (attention.AttentionSettings, attention.rows, attention.COLUMNS),
    "decode": (decode.DecodeSettings, decode.rows, decode.COLUMNS),
    "icl": (icl.IclSettings, icl.rows, icl.COLUMNS),
    "step": (step.StepSettings, step.rows, step.COLUMNS),
}


@command
def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        raise BadInput(f"no command '{name}', there are {', '.join(COMMANDS)}")
    cls, make_rows, columns = COMMANDS[name]
    device = pick_device(configure(cls, argv).device)
    cfg = configure(cls, [*(cls.ON_CUDA if device.type == "cuda" else ()), *argv])
    allow_tf32(False)
    measured = make_rows(cfg, device)
    header = dict(command=name, device=device_name(device), torch=torch.__version__, dtype=cfg.dtype, seed=cfg.seed)
    if device.type == "cuda":
        header["matmul_tflops"] = matmul_tflops(device)
    settings = asdict(cfg)
    own = [base.__annotations__ for base in cls.__mro__ if base.__module__.startswith("benchmarks.")]
    shown = [key for key in settings if key not in header and key != "out" and any(key in each for each in own)]
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    print(" ".join(f"{key}={settings[key]}" for key in shown))
    print(heading(columns), flush=True)
    rows = []
    for row in measured:
        rows.append(row)
        print(line(row, columns), flush=True)
        for kernel, ms, launches in row.get("kernels", ()):
            print(f"{ms:10.3f} ms {launches:6.0f} x {kernel[:90]}", flush=True)
        if cfg.out:  # after every row: a command cut short leaves what it measured
            Path(cfg.out).write_text(json.dumps(dict(**header, settings=settings, rows=rows), indent=1) + "\n")
    if any(row.get("note", "").startswith(("WRONG", "FAILED")) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
