"""nanoGPT's and the original's own commands: config files, parametrization, GPT-2's weights, answered flags."""

import json
import math
from collections import Counter

import pytest
import torch
from runs import TINY_LM, assert_same_run, begin, flags, metrics, record, signal_at, stops

import sample
import train
import train_ICL
from model import GPT
from training import pretrained
from training.configurator import configure
from training.originals import IN_CONTEXT, LANGUAGE_MODEL

DEFAULTS = "config/nanogpt.py"
EVALUATION = dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False)
FILES = {  # nanoGPT's config files as they are
    "train_gpt2": dict(
        wandb_log=True, wandb_project="owt", wandb_run_name="gpt2-124M", batch_size=12, block_size=1024,
        gradient_accumulation_steps=40, max_iters=600_000, lr_decay_iters=600_000, eval_interval=1000, eval_iters=200,
        log_interval=10, weight_decay=0.1,
    ),
    "train_shakespeare_char": dict(
        out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200, log_interval=10,
        always_save_checkpoint=False, wandb_log=False, wandb_project="shakespeare-char", wandb_run_name="mini-gpt",
        dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64, block_size=256, n_layer=6, n_head=6,
        n_embd=384, dropout=0.2, learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99,
        warmup_iters=100,
    ),
    "finetune_shakespeare": dict(
        out_dir="out-shakespeare", eval_interval=5, eval_iters=40, wandb_log=False, wandb_project="shakespeare",
        dataset="shakespeare", init_from="gpt2-xl", always_save_checkpoint=False, batch_size=1,
        gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, decay_lr=False,
    ),
    "eval_gpt2": EVALUATION | dict(init_from="gpt2"),
    "eval_gpt2_medium": EVALUATION | dict(init_from="gpt2-medium"),
    "eval_gpt2_large": EVALUATION | dict(init_from="gpt2-large"),
    "eval_gpt2_xl": EVALUATION | dict(init_from="gpt2-xl"),
}  # fmt: skip
EXTRA = {"finetune_shakespeare": "import time\nwandb_run_name = 'ft-' + str(time.time())\n"}
TINY_GPT2 = dict(vocab_size=96, n_positions=32, n_embd=16, n_layer=2, n_head=2)
NANO_TINY = dict(TINY_LM, dropout=0.0, max_iters=4, bias=True)


@pytest.fixture(params=FILES)
def config(request, tmp_path):
    """(name, path) of each of nanoGPT's config files."""
    path = tmp_path / f"{request.param}.py"
    lines = [f"{name} = {value!r}\n" for name, value in FILES[request.param].items()]
    path.write_text("".join(lines) + EXTRA.get(request.param, ""))
    return request.param, str(path)


# --- config files ---


def test_nanogpts_config_files_after_its_defaults(config):
    """They set what they say, and what they leave out is nanoGPT's, not the paper's."""
    name, path = config
    cfg = configure(train.Settings, [DEFAULTS, path])
    said = {train.Settings.ALIASES.get(key, key): value for key, value in FILES[name].items()}
    if "init_from" in said:
        said["pretrained"], said["init_from"] = said["init_from"], "scratch"
    usual = dict(
        n_layer=12, n_head=12, d_model=768, block_size=1024, dropout=0.0, bias=False, dataset="openwebtext",
        batch_size=12, gradient_accumulation_steps=40, init_lr=6e-4, max_iters=600_000, weight_decay=0.1, beta1=0.9,
        beta2=0.95, grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600_000, min_lr=6e-5,
        eval_interval=2000, eval_iters=200, log_interval=1, do_qk_ln=False, mup=False, tie_weights=True,
    )  # fmt: skip
    for key, value in (usual | said).items():
        assert getattr(cfg, key) == value, key


def test_alone_they_are_refused(config, tmp_path, capsys):
    """They would train something else: the paper's data, rate and schedule."""
    _, path = config
    assert stops(train.main, [path, f"--out_dir={tmp_path / 'run'}", "--wandb_log=False"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "config/nanogpt.py" in said
    assert not (tmp_path / "run").exists()


def test_the_originals_config_files_read_what_its_script_imports(tmp_path):
    file = tmp_path / "struct.py"
    file.write_text("out_dir = os.path.join('out', 'x')\ninit_lr = np.sqrt(1e-4)\nlr_decay_iters = max_iters // 2\n")
    cfg = configure(train.Settings, ["--max_iters=10", "--decay_lr=True", str(file)])
    assert (cfg.out_dir, cfg.init_lr, cfg.lr_decay_iters) == ("out/x", pytest.approx(0.01), 5)
    assert type(cfg.init_lr) is float


def test_rates_of_nanogpt():
    decays = train.Settings(mup=False, decay_lr=True, warmup_iters=4, lr_decay_iters=8, min_lr=3e-4, init_lr=3e-3)
    assert [train.rate_factor(decays, step) for step in (0, 3, 6, 9)] == pytest.approx([0.25, 1, 0.55, 0.1])
    constant = train.Settings(warmup_iters=4, warmup_constant=False)
    assert [train.rate_factor(constant, step) for step in (0, 3, 9)] == [1, 1, 1]


# --- parametrization ---


def test_without_mup_weights_and_rates_are_gpt2s(data_dir, tmp_path):
    wide = dict(d_model=128, n_head=4, n_layer=3, mup=False, tie_weights=True, weight_decay=0.1, bias=True)
    steps, run = begin(train, TINY_LM, wide, dict(data_dir=data_dir, out_dir=tmp_path))
    model = run.model
    assert model.lm_head.weight is model.wte.weight
    block = model.trunk.h[0]
    for layer, std in [
        (model.wte, 0.02), (model.trunk.wpe, 0.02), (block.attn.scoring.query, 0.02), (block.attn.value, 0.02),
        (block.mlp.c_fc, 0.02), (block.attn.c_proj, 0.02 / 6**0.5), (block.mlp.c_proj, 0.02 / 6**0.5),
    ]:  # fmt: skip
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.attn.scoring.scale(32) == 32**-0.5
    groups = run.optimizer.adamw.param_groups
    assert {group["peak_lr"] for group in groups} == {TINY_LM["init_lr"]}
    assert {group["eps"] for group in groups} == {1e-8}
    decay = Counter()
    for group in groups:
        decay[group["weight_decay"]] += sum(p.numel() for p in group["params"])
    assert sum(decay.values()) == sum(p.numel() for p in model.parameters())
    assert decay[0.1] == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    steps.close()


NEW = dict(mup=False, tie_weights=True, gelu_tanh=True, bias=True, do_qk_ln=False, warmup_constant=False)


@pytest.mark.parametrize("structure", ["low_rank", "multi_level_low_rank"])
def test_a_resumed_run_equals_the_uninterrupted_one(argv, structure, tmp_path, monkeypatch):
    given = dict(NEW, token_mixing_struct=structure, mlr_rank_list="4|2|2", weight_decay=0.1)
    train.main(argv(given, out_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        signal_at(patch, train, 3, 15)
        stops(train.main, argv(given, out_dir=tmp_path / "cut"))
    train.main(argv(given, out_dir=tmp_path / "cut", init_from="resume"))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    model, _, _ = sample.load_model(tmp_path / "cut")
    assert model.lm_head.weight is model.wte.weight
    prompt = torch.randint(96, (2, 5))
    kept, anew = (model.generate(prompt, 10, temperature=0, use_cache=cache) for cache in (True, False))
    assert torch.equal(kept, anew)


# --- GPT-2's weights ---


def gpt2_state(n_layer=2, D=16, vocab=96, positions=32, prefix="transformer."):
    """Random weights under the names that transformers saves GPT-2's with, linear layers (d_in, d_out)."""
    torch.manual_seed(0)
    shapes = {"wte.weight": (vocab, D), "wpe.weight": (positions, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(n_layer):
        for name, (d_in, d_out) in {
            "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D),
        }.items():  # fmt: skip
            shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
        shapes |= {f"h.{i}.{ln}.{part}": (D,) for ln in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes[f"h.{i}.attn.bias"] = (1, 1, positions, positions)
    return {prefix + name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def gpt2_logits(state, idx, n_head=2):
    """GPT-2 as its paper has it, from such weights."""
    w = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    T = idx.shape[1]
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    for i in range(2):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in qkv)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def write_gpt2(folder, state, **changes):
    folder.mkdir()
    config = TINY_GPT2 | dict(model_type="gpt2", activation_function="gelu_new") | changes
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def start(folder, data_dir, out_dir, **more):
    """A run that begins from weights, before its first step; the architecture is that of the folder."""
    few = {key: value for key, value in NANO_TINY.items() if key not in ("n_layer", "n_head", "d_model", "bias")}
    return begin(train, few, dict(init_from=folder, mup=False, data_dir=data_dir, out_dir=out_dir), more)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_saved_state_dict_gives_gpt2s_logits(prefix, data_dir, tmp_path):
    """The layout of transformers, and of the hub's own file of gpt2, without the package."""
    state = gpt2_state(prefix=prefix)
    steps, run = start(write_gpt2(tmp_path / "gpt2", state), data_dir, tmp_path / "run")
    idx = torch.randint(96, (3, 16))
    assert torch.allclose(run.model.eval()(idx), gpt2_logits(state, idx), atol=2e-5)
    assert run.model.lm_head.weight is run.model.wte.weight
    settings = record(tmp_path / "run")["settings"]
    assert (settings["d_model"], settings["block_size"], settings["bias"]) == (16, 16, True)
    steps.close()


def test_transformers_own_logits(data_dir, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs requirements-chronos.txt")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY_GPT2, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    steps, run = start(tmp_path / "gpt2", data_dir, tmp_path / "run")
    idx = torch.randint(96, (3, 16))
    with torch.no_grad():
        assert torch.allclose(run.model.eval()(idx), theirs(idx).logits, atol=2e-5)
    steps.close()


def test_an_mlr_model_starts_from_the_same_weights_and_resumes(data_dir, tmp_path):
    """One level of all features is standard attention but for its scale, which is 1/r for 1/sqrt(r)."""
    state = gpt2_state()
    folder = write_gpt2(tmp_path / "gpt2", state)
    mlr = dict(token_mixing_struct="multi_level_low_rank", mlr_rank_list="8")
    steps, run = start(folder, data_dir, tmp_path / "mlr", **mlr)
    scaled = {name: t.clone() for name, t in state.items()}
    for name in scaled:
        if ".c_attn." in name:
            scaled[name][..., :16] *= 8**-0.5
    idx = torch.randint(96, (3, 16))
    assert torch.allclose(run.model.eval()(idx), gpt2_logits(scaled, idx), atol=2e-5)
    steps.close()

    base = {key: value for key, value in NANO_TINY.items() if key not in ("n_layer", "n_head", "d_model", "bias")}
    common = dict(mlr, mlr_rank_list="4|2|2", mup=False, data_dir=data_dir, pretrained=folder)
    train.main(flags(base, common, out_dir=tmp_path / "whole"))
    train.main(flags(base, common, out_dir=tmp_path / "cut", max_iters=2))
    train.main(flags(base, common, out_dir=tmp_path / "cut", init_from="auto"))
    assert metrics(tmp_path / "cut")[-1]["val/loss"] == metrics(tmp_path / "whole")[-1]["val/loss"]
    sample.main([f"--out_dir={tmp_path / 'cut'}", "--max_new_tokens=4", "--num_samples=1", "--device=cpu"])


def test_a_resume_says_that_the_weights_need_naming(data_dir, tmp_path, capsys):
    """nanoGPT's init_from = "resume" takes the place of its init_from = "gpt2"."""
    steps, _ = start(write_gpt2(tmp_path / "gpt2", gpt2_state()), data_dir, tmp_path / "run")
    list(steps)
    given = flags(NANO_TINY, mup=False, data_dir=data_dir, out_dir=tmp_path / "run", init_from="resume", bias=False)
    assert stops(train.main, given) == 2
    assert f"was made with pretrained = '{tmp_path / 'gpt2'}', this run has pretrained = ''" in capsys.readouterr().err


def test_text_from_gpt2s_weights(tmp_path, monkeypatch, capsys):
    """sample.py, with a vocabulary that needs no download; prompts and texts are GPT-2's tokens."""
    codec = (lambda text: [ord(c) for c in text], lambda ids: str(ids.tolist()))
    monkeypatch.setattr(sample, "gpt2_codec", lambda: codec)
    folder = write_gpt2(tmp_path / "gpt2", gpt2_state(vocab=50257), vocab_size=50257)
    options = ["--start=ab", "--num_samples=1", "--max_new_tokens=3", "--temperature=0", "--device=cpu"]
    sample.main([f"--init_from={folder}", *options])
    tokens = json.loads(capsys.readouterr().out.splitlines()[0])
    state, idx = torch.load(folder / "pytorch_model.bin"), torch.tensor([[97, 98]])
    for _ in range(3):
        idx = torch.cat([idx, gpt2_logits(state, idx)[:, -1:].argmax(-1)], 1)
    assert tokens == idx[0].tolist()


BAD_WEIGHTS = {  # changes to config.json, flags, words of the message
    "µP": ({}, ["--mup=True"], ["not trained in µP", "--mup=False", "config/nanogpt.py"]),
    "bilinear": ({}, ["--token_mixing_struct=bilinear_BTT"], ["bilinear_BTT has no queries and keys"]),
    "heads": ({}, ["--n_kv_head=1"], ["scoring.key.weight", "(16, 16)", "(8, 16)"]),
    "vocabulary": ({}, ["--vocab_size=100"], ["knows 96 tokens", "100", "--dataset=openwebtext"]),
    "kind": (dict(model_type="llama"), [], ["model_type is 'llama'", "'gpt2'"]),
    "scale": (dict(scale_attn_by_inverse_layer_idx=True), [], ["scale_attn_by_inverse_layer_idx is True"]),
    "activation": (dict(activation_function="relu"), [], ["'relu'", "gelu_new"]),
    "layers": (dict(n_layer=3), [], ["nothing", "trunk.h.2"]),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit(case, data_dir, tmp_path, capsys):
    changes, more, words = BAD_WEIGHTS[case]
    folder = write_gpt2(tmp_path / "gpt2", gpt2_state(), **changes)
    argv = flags(NANO_TINY, init_from=folder, mup=False, data_dir=data_dir, out_dir=tmp_path / "run")
    assert stops(train.main, argv + more) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_names_and_files_that_are_not_there(data_dir, tmp_path, capsys):
    argv = flags(NANO_TINY, mup=False, data_dir=data_dir, out_dir=tmp_path / "run")
    assert stops(train.main, [*argv, "--init_from=gpt3"]) == 2
    assert "no weights 'gpt3'; init_from is scratch, resume, auto, gpt2, gpt2-medium" in capsys.readouterr().err
    folder = write_gpt2(tmp_path / "gpt2", {})
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    assert stops(train.main, [*argv, f"--init_from={folder}"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (folder / "config.json").write_text("{")
    assert stops(train.main, [*argv, f"--init_from={folder}"]) == 2
    assert "config.json is damaged" in capsys.readouterr().err


def test_the_shapes_behind_the_names():
    """Parameters of the four sizes, the tied head counted once (nanoGPT's README)."""
    for name, millions in {"gpt2": 124, "gpt2-medium": 354, "gpt2-large": 774, "gpt2-xl": 1557}.items():
        cfg = train.Settings(init_from=name, mup=False)
        fixed = train.Settings(**vars(cfg) | pretrained.architecture(cfg))
        with torch.device("meta"):
            model = GPT(fixed.model_config(), 50257, fixed.tie_weights)
        assert model.num_params()[0] / 1e6 == pytest.approx(millions, abs=1)


# --- the original's flags, folders ---


@pytest.mark.parametrize(("script", "flag"), [
    *((train, flag) for flag in LANGUAGE_MODEL), *((train_ICL, flag) for flag in IN_CONTEXT),
])  # fmt: skip
@pytest.mark.parametrize("form", ["--{}", "--{}=3", "file"])
def test_flags_of_the_original_are_answered(script, flag, form, tmp_path, capsys):
    argv = form.format(flag)
    if form == "file":
        argv = tmp_path / "theirs.py"
        argv.write_text(f"{flag} = 3\n")
    assert stops(script.main, [str(argv), f"--out_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {argv}: no setting '{flag}'; {script.Settings.ANSWERS[flag]}\n"
    assert flag not in vars(script.Settings())


def test_flags_of_the_original_that_are_obeyed(argv, tmp_path):
    given = ["--evaluation_interval=7", "--wandb_name=a", "--wandb_log_every_steps=3"]
    given += ["--training_curriculum_warmup_ratio=0.5"]
    cfg = configure(train_ICL.Settings, given)
    assert (cfg.eval_interval, cfg.wandb_run_name, cfg.log_interval) == (7, "a", 3)
    assert cfg.training_curriculum_warmup_ratio == 0.5
    train.main(argv(vocab_size=128, out_dir=tmp_path, max_iters=1))
    model, _, _ = sample.load_model(tmp_path)
    assert model.wte.weight.shape == (128, 16)


def test_answers_name_settings_that_there_are():
    for script, answers in [(train, LANGUAGE_MODEL), (train_ICL, IN_CONTEXT)]:
        for answer in answers.values():
            for word in answer.replace("=", " ").replace(",", " ").replace(";", " ").replace(":", " ").split():
                assert not word.startswith("--") or hasattr(script.Settings(), word[2:]), word


def test_data_dir_either_way(tmp_path, argv, data_dir, capsys):
    """The folder of the datasets, or, as in the original, the dataset's own."""
    train.main(argv(out_dir=tmp_path / "parent"))
    train.main(argv(out_dir=tmp_path / "own", data_dir=data_dir / "text"))
    train.main(argv(out_dir=tmp_path / "moved", data_dir=data_dir / "text", dataset="openwebtext_small"))
    assert_same_run(tmp_path / "own", tmp_path / "parent")
    capsys.readouterr()
    missing = argv(data_dir="data/openwebtext", dataset="openwebtext", out_dir=tmp_path / "no")
    assert stops(train.main, missing) == 2
    assert "make it with: python data/openwebtext/prepare.py" in capsys.readouterr().err


def test_one_out_dir_for_a_loop_of_runs(argv, tmp_path, capsys):
    """Each run has a folder of its own in it; the same command finds its own again."""
    for seed in (1, 2, 2):
        train.main(argv(out_dir=tmp_path, own_folder=True, seed=seed, max_iters=2, init_from="auto"))
    folders = sorted(path.parent for path in tmp_path.rglob("run.json"))
    assert sorted(record(folder)["settings"]["seed"] for folder in folders) == [1, 2]
    assert all(folder.parent == tmp_path and folder.name.startswith("low_rank_") for folder in folders)
    assert str(folders[0]) in capsys.readouterr().out
    train.main(argv(out_dir=folders[0], init_from="auto", seed=record(folders[0])["settings"]["seed"]))
    assert stops(train.main, argv(out_dir=folders[0])) == 2
    assert "--own_folder=True makes one in it for each run" in capsys.readouterr().err
