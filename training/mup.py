"""Maximal update parametrization: initial size and Adam learning rate by the role of a parameter (DESIGN 6).

Beside it stands the standard parametrization, GPT-2's initial sizes, for models that are not scaled in width.
"""

import torch
from torch import nn

BASE_WIDTH = 768  # at this fan-in the tuned learning rate is used as it is
RULES = {  # role: (initial standard deviation given fan-in, learning-rate factor given fan-in)
    "embedding": (lambda n: 0.02, lambda n: 1.0),
    "hidden": (lambda n: n**-0.5, lambda n: BASE_WIDTH / n),
    "output": (lambda n: 0.0, lambda n: BASE_WIDTH / n),
    "bias": (lambda n: 0.0, lambda n: 1.0),
}
GPT2_STD, BRANCH_END = 0.02, "c_proj.weight"  # without µP: 0.02, and 0.02 / sqrt(2 n_layer) where a branch ends


def roles(model):
    """(name, parameter, role or "norm", fan_in) of every parameter; an unlabelled one is a mistake, a TypeError.

    A parameter that two modules share has the role that the first of them gives it.
    """
    seen = set()
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            if p in seen:
                continue
            seen.add(p)
            if name == "bias":
                yield full, p, "bias", 1
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
                yield full, p, "norm", 1
            elif getattr(module, "role", None) in RULES:
                yield full, p, module.role, module.fan_in
            else:
                raise TypeError(f"{full} states no role; its module needs one of {', '.join(RULES)}")


@torch.no_grad()
def initialise(model, mup=True):
    """Draw every parameter by its role, or without µP as GPT-2's are drawn. Weights of norms are ones."""
    branches = sum(name.endswith(BRANCH_END) for name, _ in model.named_parameters())  # two of a block
    for name, p, role, fan_in in roles(model):
        std = None if role == "norm" else RULES[role][0](fan_in)
        if not mup and role not in ("norm", "bias"):
            std = GPT2_STD * (branches**-0.5 if name.endswith(BRANCH_END) else 1.0)
        if std is None:
            p.fill_(1.0)
        elif std == 0:
            p.zero_()
        else:
            p.normal_(std=std)


def param_groups(model, lr, weight_decay=0.0):
    """Optimizer groups, one for each pair of learning rate and weight decay; decay only where dim >= 2."""
    groups = {}
    for _, p, role, fan_in in roles(model):
        peak = lr if role == "norm" else lr * RULES[role][1](fan_in)
        decay = weight_decay if p.ndim >= 2 else 0.0
        groups.setdefault((peak, decay), []).append(p)
    return [
        dict(params=params, lr=peak, peak_lr=peak, weight_decay=decay) for (peak, decay), params in groups.items()
    ]


def adamw(model, lr, *, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-20, device_type="cpu"):
    """AdamW with the learning rates of the roles; eps so small that the gradients of wide layers are not damped.

    On a GPU the rates are tensors, which a CUDA graph reads anew: set them by `fill_`.
    """
    groups, on_gpu = param_groups(model, lr, weight_decay), device_type == "cuda"
    for group in groups if on_gpu else ():
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=on_gpu, capturable=on_gpu)
