"""GPT-2's weights, by name or from a folder that transformers saved, in the models of this project."""

import json
from pathlib import Path

import torch

from training.checkpoint import load_weights
from training.errors import BadInput
from training.settings import STARTS

GPT2 = {  # name on the hub: (n_layer, n_head, d_model)
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}  # fmt: skip
ACTIVATIONS = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}  # name: whether it is that with a tanh
ONLY = dict(  # what model.py does not vary of GPT-2
    model_type="gpt2", layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False
)


def architecture(cfg):
    """The settings that GPT-2's weights of the name cfg.pretrained fix; BadInput for a name or a model that cannot be.

    cfg: the settings of train.py. Longer sequences than block_size need not be known, so the smaller length stands.
    """
    found = _config(cfg.pretrained)
    if cfg.mup:
        raise BadInput(
            f"{cfg.pretrained} was not trained in µP: give --mup=False, or config/nanogpt.py before all else, which "
            "also sets what nanoGPT's config files do not say"
        )
    if cfg.token_mixing_struct.startswith("bilinear"):
        raise BadInput(f"{cfg.token_mixing_struct} has no queries and keys that {cfg.pretrained}'s weights could be")
    return dict(
        n_layer=found["n_layer"], n_head=found["n_head"], d_model=found["n_embd"], d_head=-1, bias=True, do_qk_ln=False,
        block_size=min(cfg.block_size, found["n_positions"]), tie_weights=True, position="learned",
        gelu_tanh=ACTIVATIONS[found["activation_function"]],
    )  # fmt: skip


def _config(name):
    """transformers' configuration of the model, with GPT-2's values where it gives none."""
    n_layer, n_head, n_embd = GPT2.get(name, GPT2["gpt2"])
    usual = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=1024, activation_function="gelu_new")
    path = Path(name) / "config.json"
    if not path.is_file():
        if name not in GPT2:
            starts = ", ".join([*STARTS, *GPT2])
            raise BadInput(f"no weights '{name}'; init_from is {starts}, or a folder with transformers' config.json")
        return usual
    try:
        found = usual | ONLY | json.loads(path.read_text())
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error})") from None
    for key, value in ONLY.items():
        if found[key] != value:
            raise BadInput(f"{path}: {key} is {found[key]!r}, GPT-2's models here have {value!r}")
    if found["activation_function"] not in ACTIVATIONS:
        raise BadInput(f"{path}: no activation '{found['activation_function']}', there are {', '.join(ACTIVATIONS)}")
    return found


def load_pretrained(model, name):
    """Put GPT-2's weights into a GPT; BadInput where they cannot be had or do not fit."""
    weights = translated(_weights(name), model.block_size)
    theirs, ours = (table.shape[0] for table in (weights["wte.weight"], model.wte.weight))
    if theirs != ours:
        raise BadInput(f"{name} knows {theirs:,} tokens, the dataset has {ours:,}; --dataset=openwebtext has GPT-2's")
    load_weights(model, weights, name)


def translated(weights, block_size):
    """A state dict of transformers' GPT-2 under the names of `model.GPT`.

    Its linear layers hold (d_in, d_out), ours (d_out, d_in); its c_attn is queries, keys and values side by side.
    """
    ours = {}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks of earlier versions
            continue
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.mT
        if name.startswith(("h.", "ln_f.", "wpe.")):
            name = f"trunk.{name}"
        if ".c_attn." in name:
            for part, piece in zip(("scoring.query", "scoring.key", "value"), tensor.chunk(3), strict=True):
                ours[name.replace("c_attn", part)] = piece
        else:
            ours[name] = tensor
    ours["trunk.wpe.weight"] = ours["trunk.wpe.weight"][:block_size]
    ours.setdefault("lm_head.weight", ours["wte.weight"])
    return ours


def _weights(name):
    """The state dict: of the folder's pytorch_model.bin, or as transformers reads the folder or the name."""
    try:
        if (path := Path(name) / "pytorch_model.bin").is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel.from_pretrained(name).state_dict()
    except ImportError:
        raise BadInput(f"{name} is read by the package transformers: pip install transformers") from None
    except Exception as error:  # of any of its kinds: no network, no such file, damaged
        why = str(error).strip().partition("\n")[0]
        raise BadInput(f"the weights of {name} cannot be read ({type(error).__name__}): {why}") from None
