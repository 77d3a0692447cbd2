"""The optimizer of a run: AdamW by the rules of µP, with the loss scale that float16 needs."""

import math

import torch
from torch.nn.utils import clip_grad_norm_

from training.distributed import held
from training.mup import adamw


class Optimizer:
    """AdamW over a model's parameters. A step is `backward` for each micro-batch, `clip`, `step`.

    peak_lr: learning rate at µP's base width; of every parameter with `one_rate` or without `mup`. `set_rate` sets the
    share of the peak rates; on a GPU they are tensors, which a CUDA graph reads anew.
    """

    def __init__(self, model, peak_lr, cfg, device, *, one_rate=False, mup=True):
        self.model, self.peak_lr, self.factor = model, peak_lr, None
        options = dict(weight_decay=cfg.weight_decay, betas=(cfg.beta1, cfg.beta2), device_type=device.type)
        options |= {} if mup else dict(eps=1e-8)  # AdamW's own
        self.adamw = adamw(model, peak_lr, **options)
        for group in self.adamw.param_groups if one_rate or not mup else ():
            group["peak_lr"] = peak_lr
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")

    @property
    def rate(self):
        """The learning rate at the base width, as set last."""
        return self.peak_lr * self.factor

    def set_rate(self, factor):
        if factor == self.factor:
            return
        self.factor = factor
        for group in self.adamw.param_groups:
            rate = group["peak_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def backward(self, loss):
        """Add the gradients of a loss."""
        self.scaler.scale(loss).backward()

    def clip(self, largest):
        """Scale the gradients down to a norm of at most `largest` (0: leave them); the norm they had, a tensor."""
        self.scaler.unscale_(self.adamw)
        norm = clip_grad_norm_(self.model.parameters(), largest or math.inf)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of parameters in shards

    def step(self):
        """Move the parameters and forget the gradients. In float16 a step whose gradients overflow moves nothing."""
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)

    def state(self):
        """AdamW's state, with learning rates as numbers, which on a GPU are tensors."""
        state = self.adamw.state_dict()
        return dict(state, param_groups=[dict(group, lr=float(group["lr"])) for group in state["param_groups"]])

    def restore(self, saved):
        """Take the moments of a saved state; rates are functions of the settings and of where this run computes."""
        parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        moments = {
            i: {name: held(t, like=parameters[i]) for name, t in state.items()} for i, state in saved["state"].items()
        }
        self.adamw.load_state_dict(dict(state=moments, param_groups=self.adamw.state_dict()["param_groups"]))
