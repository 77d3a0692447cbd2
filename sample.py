"""Write text from a checkpoint of train.py, for every scoring function.

    python sample.py --out_dir=out/shakespeare_char_mlr --start="ROMEO:" --num_samples=2
    python sample.py --out_dir=out/shakespeare_char_mlr --start=LINES:starts.txt
    python sample.py --init_from=gpt2-xl --start="What is the answer?" --max_new_tokens=100

Keys and values of the text so far are kept (for MLR attention the keys of the current blocks only), so that a token
costs one row of scores. Beyond block_size the context is its last block_size tokens, recomputed at every token.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from data.corpus import GPT2_VOCAB, codec, gpt2_codec
from model import GPT
from train import Settings as TrainSettings
from training import devices
from training.checkpoint import load_run, load_weights
from training.configurator import configure, require_at_least, restored, setting
from training.errors import BadInput, command, reading
from training.pretrained import architecture, load_pretrained


@dataclass
class Settings:
    """Write text from a checkpoint. Config files and flags, the later one winning."""

    init_from: str = setting("resume", "resume: the run in out_dir; gpt2, .., gpt2-xl or a folder: GPT-2's weights")
    out_dir: str = setting("out", "folder of the run that train.py made")
    checkpoint: str = setting("auto", "last (ckpt.pt), best (best.pt), auto: best if the run kept that, else last")
    start: str = setting("\n", "text to go on from; FILE:path: that of a file; LINES:path: every line of a file")
    num_samples: int = setting(3, "how many texts, of each start")
    max_new_tokens: int = setting(500, "tokens in each; those beyond block_size are slow, they recompute their context")
    temperature: float = setting(0.8, "below 1 less random, above 1 more; 0 takes the likeliest token")
    top_k: int = setting(200, "only the k likeliest tokens are drawn; 0: all")
    seed: int = setting(1337, "seed of the draws")
    use_cache: bool = setting(True, "keep keys and values where there is a cache; False: recompute at every token")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, or auto: the GPU if there is one")
    dtype: str = setting("float32", "precision: float32, bfloat16 or float16")

    AT_LEAST: ClassVar[dict] = dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0)

    def __post_init__(self):
        require_at_least(self, self.AT_LEAST)

    def prompts(self):
        """The texts to go on from."""
        kind, colon, path = self.start.partition(":")
        if not colon or kind not in ("FILE", "LINES"):
            return [self.start]
        if not Path(path).is_file():
            raise BadInput(f"no file {path} to start from")
        text = Path(path).read_text()
        return [text] if kind == "FILE" else [line for line in text.splitlines() if line]


def load_model(out_dir, device="cpu", which="auto"):
    """(model in evaluation mode, encode, decode) of a run of train.py; which: as in training.checkpoint.load_run."""
    saved, path = load_run(out_dir, "train.py", "corpus", which)
    with reading(path):
        trained = restored(TrainSettings, saved["settings"])
        model = GPT(trained.model_config(), len(saved["model"]["wte.weight"]), trained.tie_weights).to(device)
        load_weights(model, saved["model"], path)
        return model.eval(), *codec(saved["corpus"])


def load_gpt2(name, device="cpu"):
    """(model in evaluation mode, encode, decode) of GPT-2's weights."""
    cfg = TrainSettings(pretrained=name, mup=False)
    cfg = replace(cfg, **architecture(cfg))
    model = GPT(cfg.model_config(), GPT2_VOCAB, cfg.tie_weights)
    load_pretrained(model, name)
    return model.to(device).eval(), *gpt2_codec()


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    device = devices.pick_device(cfg.device)
    from_run = cfg.init_from == "resume"
    of_run = (cfg.out_dir, device, cfg.checkpoint)
    model, encode, decode = load_model(*of_run) if from_run else load_gpt2(cfg.init_from, device)
    prompts = [encode(text) for text in cfg.prompts()]
    if not prompts or not all(prompts):
        raise BadInput("the start is empty; give at least one character")
    rows = [torch.tensor(prompt, device=device) for prompt in prompts for _ in range(cfg.num_samples)]
    generator = torch.Generator(device).manual_seed(cfg.seed)
    with devices.autocast(device, cfg.dtype):
        out = model.generate(
            rows,
            cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k or None,
            generator=generator,
            use_cache=None if cfg.use_cache else False,
        )
    for tokens in out:
        print(decode(tokens))
        print("-" * 15)


if __name__ == "__main__":
    main()
