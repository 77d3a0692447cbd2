"""A training step as one CUDA graph: recorded once, then replayed by a single call of the host.

What a step reads stands in memory that never moves, and what it changes (parameters, moments, sums of losses) it
changes in place. Such a program can be recorded, and it can just as well be called: on another device `StaticStep`
does that, which is how the tests compare it with the ordinary step.
"""

import torch

from training.errors import BadInput

CHOICES = ("auto", "True", "False")
WARM_UP = 3  # steps before the recording, in which kernels are compiled and chosen and the optimizer makes its moments


def wanted(choice, device, dtype, processes):
    """Whether a run replays its steps. "True" where no graph can hold a step is BadInput; "auto" is False there."""
    if choice not in CHOICES:
        raise BadInput(f"cuda_graph is '{choice}', there are {', '.join(CHOICES)}")
    why = refusal(device, dtype, processes)
    if choice == "True" and why:
        raise BadInput(f"cuda_graph=True cannot be: {why}; --cuda_graph=auto uses a graph where there can be one")
    return choice != "False" and not why


def refusal(device, dtype, processes):
    """Why a CUDA graph cannot hold a step, or None."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype == "float16":
        return "float16 looks at every gradient before it takes a step"
    return f"{processes} processes wait for each other in a step" if processes > 1 else None


class StaticStep:
    """`work(*tensors)`, in which every call finds its inputs in the same memory.

    On CUDA the first WARM_UP calls run `work` as it is, the next one records it, and from there on a call copies its
    inputs and replays: the host waits for nothing. Every call counts once, the recording does no work of its own.
    Random numbers follow the device's seed at the time of the call. Elsewhere every call runs `work`.
    """

    def __init__(self, work, device):
        self.work, self.device = work, device
        self.held, self.graph, self.calls = None, None, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *inputs):
        if self.held is None:
            self.held = [x.clone() for x in inputs]
        for held, x in zip(self.held, inputs, strict=True):
            held.copy_(x)
        if self.stream is None:
            self.work(*self.held)
        elif self.calls < WARM_UP:
            self._warm_up()
        else:
            if self.graph is None:
                self._record()
            self.graph.replay()
        self.calls += 1

    def _warm_up(self):
        """An ordinary call, on the stream of the recording, as PyTorch's notes on CUDA graphs ask for."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.work(*self.held)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _record(self):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=self.stream):
            self.work(*self.held)
