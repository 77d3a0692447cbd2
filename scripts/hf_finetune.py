"""What MLR attention costs a trained model of transformers, and what fine-tuning brings back: a few minutes on a CPU.

    python data/pydocs/prepare.py
    python scripts/hf_finetune.py --kind=llama --seed=1 --out=results/hf/llama_seed1.json

Trains a small Llama or GPT-2 on characters with its own attention; then gives MLR attention to copies of it, measures
their validation loss as they are, and trains each on for some steps, beside one that keeps its attention. All see the
same batches.
"""

import copy
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.corpus import load_corpus  # noqa: E402
from data.files import write_json  # noqa: E402
from data.windows import IGNORED, draw_windows, text_windows  # noqa: E402
from structured import default_block_sizes  # noqa: E402
from training.configurator import configure, parse_list, require_at_least, setting  # noqa: E402
from training.errors import BadInput, command  # noqa: E402
from training.files import check_output  # noqa: E402
from training.schedule import lr_factor  # noqa: E402

LEVELS = (  # ranks and weighting, in heads of 32 features
    "16|8|4|4 none", "8|8|8|8 none", "8|8|8|8 shared", "16|8|4|4 none sorted", "8|8|8|8 none sorted",
)  # fmt: skip


@dataclass
class Settings:
    """Train a small model of transformers, give it MLR attention, train it on."""

    kind: str = setting("llama", "llama (RoPE, RMSNorm) or gpt2 (learned positions)")
    data: str = setting("data/pydocs", "folder of a corpus")
    out: str = setting("out/hf.json", "the record")
    seed: int = setting(1, "of the weights and of the batches")
    n_layer: int = setting(3, "layers of 4 heads of 32 features")
    block_size: int = setting(256, "tokens of a window")
    batch_size: int = setting(4, "windows of a step")
    steps: int = setting(1500, "before")
    more_steps: int = setting(300, "after")
    lr: float = setting(2e-3, "peak learning rate, with a cosine to a tenth")
    more_lr: float = setting(5e-4, "the same of the steps after")
    eval_windows: int = setting(128, "windows of validation text")

    def __post_init__(self):
        whole = ("n_layer", "block_size", "batch_size", "steps", "more_steps", "eval_windows")
        require_at_least(self, dict.fromkeys(whole, 1) | dict(seed=0, lr=0, more_lr=0))
        default_block_sizes(self.block_size, 4)  # refused now rather than after training


def new_model(cfg, vocab_size):
    """A small decoder with random weights."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    shape = dict(hidden_size=128, num_hidden_layers=cfg.n_layer, num_attention_heads=4, vocab_size=vocab_size)
    shape |= dict(max_position_embeddings=cfg.block_size, bos_token_id=None, eos_token_id=None)
    kinds = dict(
        llama=lambda: LlamaConfig(intermediate_size=344, **shape),
        gpt2=lambda: GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shape),
    )
    if cfg.kind not in kinds:
        raise BadInput(f"no kind '{cfg.kind}', there are {', '.join(kinds)}")
    return AutoModelForCausalLM.from_config(kinds[cfg.kind]())


def train(model, ids, cfg, steps, peak, first):
    """Train on the batches from number `first` on; gives the seconds that it took."""
    optimizer, begin = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.95), weight_decay=0.1), time.time()
    for step in range(steps):
        index = dict(seed=cfg.seed, indices=[first + step], batch_size=cfg.batch_size)
        x = torch.from_numpy(draw_windows(ids, cfg.block_size + 1, **index)[0]).long()
        optimizer.param_groups[0]["lr"] = peak * lr_factor(step, min(50, steps // 10), steps, 0.1)
        loss_of(model, x[:, :-1], x[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.time() - begin


def loss_of(model, x, y):
    return torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def val_loss(model, ids, cfg):
    """Nats a character, of windows spread evenly over the validation text."""
    x, y = (torch.from_numpy(part).long().split(16) for part in text_windows(ids, cfg.block_size, cfg.eval_windows))
    return sum(loss_of(model, *part).item() * len(part[0]) for part in zip(x, y, strict=True)) / sum(map(len, x))


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    if find_spec("transformers") is None:
        raise BadInput("no package transformers: pip install -r requirements-chronos.txt")
    from transformers import __version__

    from structured import hf

    check_output(cfg.out)
    corpus = load_corpus(cfg.data, cfg.block_size)
    torch.manual_seed(cfg.seed)
    model = new_model(cfg, corpus.vocab_size)
    seconds = train(model, corpus.train, cfg, cfg.steps, cfg.lr, 0)
    rows = [dict(attention="before", after=val_loss(model, corpus.val, cfg), seconds=seconds)]
    for name in ("own", *LEVELS):
        copied = copy.deepcopy(model)
        if name != "own":
            ranks, weighting, *order = name.split()
            hf.use_mlr_attention(copied, parse_list(ranks, "ranks"), weighting=weighting, sort=bool(order))
        at_once = val_loss(copied, corpus.val, cfg)
        seconds = train(copied, corpus.train, cfg, cfg.more_steps, cfg.more_lr, cfg.steps)
        rows.append(dict(attention=name, at_once=at_once, after=val_loss(copied, corpus.val, cfg), seconds=seconds))
        print(rows[-1], flush=True)
    versions = dict(torch=torch.__version__, transformers=__version__, threads=torch.get_num_threads())
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("data", "out")}
    write_json(cfg.out, dict(settings=settings, versions=versions, machine=platform.machine(), rows=rows))


if __name__ == "__main__":
    main()
