"""Devices and precision: what a run computes on, in which type, and how fast that could be."""

import contextlib
import functools
import platform

import numpy as np
import torch
import torch._functorch.config

from training.errors import BadInput

COMPILE_MODES = {  # setting: torch.compile's mode; graphs are recorded of whole steps (training/capture.py)
    "default": "default", "max-autotune": "max-autotune-no-cudagraphs",
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("cpu", "cuda", "mps")
PEAK_TFLOPS = {  # dense tensor-core rates of the vendors' datasheets: (bfloat16/float16, TF32)
    "H200": (989, 495), "H100 PCIe": (756, 378), "H100": (989, 495), "A100": (312, 156), "L40S": (362, 183),
    "L4": (121, 60), "RTX 4090": (165, 83), "V100": (125, None), "B200": (2250, 1125),
}  # fmt: skip


def pick_device(name):
    """"auto" is the GPU if there is one (CUDA, then Apple's MPS), else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.partition(":")[0] not in KINDS:
        raise BadInput(f"no device '{name}', there are {', '.join(KINDS)}; --device=auto takes what is there")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f"device '{name}' is not there: {why}; --device=auto takes what is") from None
    return torch.device(name)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()} {device.type}, {threads} thread{'s' * (threads > 1)}"


def autocast(device, dtype):
    """The context the forward pass runs in; float32 runs as it is."""
    if dtype not in DTYPES:
        raise BadInput(f"no dtype '{dtype}', there are {', '.join(DTYPES)}")
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


def seed_dropout(device, *numbers):
    """Make what dropout draws next on this device a function of `numbers`, non-negative integers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def compiler(cfg):
    """What to pass a model through: torch.compile as the settings of a run say, or nothing where compile is off."""
    if not cfg.compile:
        return lambda model: model
    torch._functorch.config.activation_memory_budget = cfg.keep
    return functools.partial(torch.compile, mode=COMPILE_MODES[cfg.compile_mode])


def allow_tf32(on):
    """Whether float32 matmuls on the GPU may round their inputs to TF32."""
    torch.set_float32_matmul_precision("high" if on else "highest")


def peak_flops(device, dtype, tf32=False):
    """FLOP/s of a known card at this precision, or None where there is no such number to compare with."""
    if device.type != "cuda" or (dtype == "float32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    for card, rates in PEAK_TFLOPS.items():
        if card in name:
            rate = rates[dtype == "float32"]
            return rate and rate * 1e12
    return None


def synchronise(device):
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
