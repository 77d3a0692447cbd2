"""Settings from files and flags, --help, and what the scripts say of input that cannot work."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY_ICL, TINY_LM, assert_same_checkpoint, checkpoint, flags, record, stops, write_corpus

import sample
import train
import train_ICL
import train_TS
from model import GPT
from training.configurator import configure, help_text, parse_list, setting
from training.errors import BadInput
from training.loop import format_time
from training.schedule import lr_factor

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train.py": train, "train_ICL.py": train_ICL}
EVERY_SCRIPT = {**SCRIPTS, "train_TS.py": train_TS, "sample.py": sample}


@pytest.fixture
def data_dir(tmp_path):
    write_corpus(tmp_path / "data" / "text")
    return tmp_path / "data"


@pytest.fixture
def refused(tmp_path, data_dir, capsys):
    """refused(script, *arguments) is the message of a run that must end with status 2 and write nothing."""

    def message(script, *arguments, **settings):
        out_dir = Path(settings.setdefault("out_dir", tmp_path / "run"))
        before = contents(out_dir)
        tiny = TINY_ICL if script == "train_ICL.py" else dict(TINY_LM, data_dir=data_dir)
        assert stops(SCRIPTS[script].main, flags(tiny, settings) + list(arguments)) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1, "one line"
        assert "step" not in said.out
        assert contents(out_dir) == before
        return said.err.removeprefix("error: ").rstrip("\n")

    return message


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else None


# --- files and flags ---


@dataclasses.dataclass
class Example:
    """An example."""

    width: int = setting(8, "how wide")
    rate: float = setting(0.5, "how fast")
    deep: bool = setting(False, "whether deep")
    name: str = setting("a", "what it is called")

    ALIASES = {"w": "width"}  # noqa: RUF012


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        ([], (8, 0.5, False, "a")),
        (["--width=16", "--rate=1e-3", "--deep=True", "--name=b c"], (16, 1e-3, True, "b c")),
        (["--rate=2"], (8, 2.0, False, "a")),
        (["--name=7"], (8, 0.5, False, "7")),
        (["--name=8|4"], (8, 0.5, False, "8|4")),
        (["--name="], (8, 0.5, False, "")),
        (["--name=a=b"], (8, 0.5, False, "a=b")),
        (["--w=3"], (3, 0.5, False, "a")),
        (["--width=3", "--width=4"], (4, 0.5, False, "a")),
        (["{file}"], (32, 3.0, False, "f")),
        (["{file}", "--width=4"], (4, 3.0, False, "f")),
        (["--width=4", "{file}"], (32, 3.0, False, "f")),
    ],
)
def test_files_and_flags_the_later_one_wins(argv, want, tmp_path):
    file = tmp_path / "config.py"
    file.write_text("# only deltas\nimport math\n_half = 16\nw = 2 * _half\nrate = 3\nname = 'f'\n")
    got = configure(Example, [arg.format(file=file) for arg in argv])
    assert dataclasses.astuple(got) == want
    assert type(got.rate) is float


@pytest.mark.parametrize("script", EVERY_SCRIPT)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(script, flag, capsys):
    """Every setting with its type, its default and a sentence."""
    assert stops(EVERY_SCRIPT[script].main, ["--seed=2", flag]) == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(EVERY_SCRIPT[script].Settings):
        row = re.search(rf"^  --{field.name} +(int|float|bool|str) +(\S.*) \[(.*)\]$", said, re.MULTILINE)
        assert row, field.name
        assert row[1] == type(field.default).__name__
        assert len(row[2].split()) >= 2
        assert row[3] == repr(field.default)


def test_help_names_what_it_is_for():
    assert help_text(Example).startswith("An example.")
    assert len(help_text(Example).splitlines()) == 3 + 4


@pytest.mark.parametrize(("text", "want"), [("8|4|4", (8, 4, 4)), ("64|0", (64, 0)), ("64", (64,))])
def test_lists(text, want):
    assert parse_list(text, "mlr_rank_list") == want


def test_aliases_reach_the_setting(data_dir, tmp_path):
    argv = flags(TINY_LM, data_dir=data_dir, out_dir=tmp_path / "run", max_iters=1)
    argv = [a.replace("--d_model", "--n_embd").replace("--init_lr", "--learning_rate") for a in argv]
    train.main(argv)
    assert record(tmp_path / "run")["settings"]["d_model"] == TINY_LM["d_model"]
    assert record(tmp_path / "run")["settings"]["init_lr"] == TINY_LM["init_lr"]


# --- bad settings ---

MLR = "--token_mixing_struct=multi_level_low_rank"
BILINEAR = "--token_mixing_struct=bilinear_MLR"
MLBTC = "--token_mixing_struct=bilinear_MLBTC"
GSWA = "--token_mixing_struct=low_rank_with_gswa"
SEQUENTIAL = "--token_mixing_struct=low_rank_with_sequential_gswa"

def test_the_forms_of_a_flag(tmp_path, monkeypatch):
    """nanoGPT's and argparse's people write them so."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from pathlib import Path\nimport math\ndropout = 0.25\n")
    given = ["--compile", "--n_layer", "3", str(tmp_path / "mine.py"), "--fsdp", "false", "--keep=.5"]
    given += ["--decay_lr=true", "--min_lr", "1e-4", "--out_dir=~/runs/a", "--data_dir", "~/data", "--tf32"]
    cfg = configure(train.Settings, given)
    assert (cfg.compile, cfg.n_layer, cfg.dropout, cfg.fsdp, cfg.keep) == (True, 3, 0.25, False, 0.5)
    assert (cfg.decay_lr, cfg.min_lr, cfg.tf32) == (True, 1e-4, True)
    assert (cfg.out_dir, cfg.data_dir) == (str(tmp_path / "runs/a"), str(tmp_path / "data"))


def test_a_config_that_sets_nothing(tmp_path):
    for name, text in [("a.py", "batch_size: 8\n"), ("b.py", "# nothing\n"), ("c.py", "import math\n")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=f"{name} sets nothing"):
            configure(train.Settings, [str(tmp_path / name)])
    for name in ("a.yaml", "a.json"):
        (tmp_path / name).write_text("batch_size: 8\n")
        with pytest.raises(BadInput, match=f"{name} is no .py file"):
            configure(train.Settings, [str(tmp_path / name)])


def test_a_rate_that_would_rise():
    with pytest.raises(BadInput, match=r"min_lr 1\.0 is above init_lr 0\.003"):
        train.Settings(decay_lr=True, min_lr=1.0)
    with pytest.raises(BadInput, match=r"min_lr is -1\.0, it must be at least 0"):
        train.Settings(decay_lr=True, min_lr=-1.0)


BOTH = [  # arguments, words of the message
    (["--keep=1.5"], ["keep is 1.5", "from 0 to 1"]),
    (["--compile_mode=fast"], ["compile_mode is 'fast'", "default, max-autotune"]),
    (
        ["--token_mixing_struct=low_rank_with_sliding_window", "--attention_backend=flex", "--sliding_block_size=4"],
        ["'flex' needs a CUDA device, not cpu"],
    ),
    (["--n_heads=3"], ["--n_heads=3", "no setting 'n_heads'", "did you mean 'n_head'?"]),
    (["--mlr_rank_lst=8"], ["did you mean 'mlr_rank_list'?"]),
    (["--compile=1"], ["compile takes bool, got 1"]),
    (["--n_layer=2.0"], ["n_layer takes int, got 2.0"]),
    (["--n_layer=two"], ["n_layer takes int, got 'two'"]),
    (["--n_layer={[]: 1}"], ["n_layer takes int"]),
    (["--n_layer=True"], ["n_layer takes int, got True"]),
    (["--dropout=high"], ["dropout takes float, got 'high'"]),
    (["--n_layer"], ["--n_layer takes a value: --n_layer=VALUE, of type int"]),
    (["--n_layer", "--seed=1"], ["--n_layer takes a value: --n_layer=VALUE"]),
    (["--n_layre", "2"], ["no setting 'n_layre', did you mean 'n_layer'?"]),
    (["--compile", "yes.py"], ["no config file 'yes.py'"]),
    (["--dropout=nan"], ["dropout takes a finite number, got nan"]),
    (["--weight_decay=1e999"], ["weight_decay takes a finite number, got inf"]),
    ([f"--seed={2**63}"], ["seed takes an integer of 64 bits"]),
    ([f"--n_layer={-(2**70)}"], ["n_layer takes an integer of 64 bits"]),
    (["--device=meta"], ["no device 'meta', there are cpu, cuda, mps"]),
    (["README.md"], ["README.md is no .py file", "name = value"]),
    (["n_layer=2"], ["no config file 'n_layer=2'"]),
    (["missing.py"], ["no config file 'missing.py'"]),
    (["--token_mixing_struct=low_rnk"], ["low_rnk", "low_rank", "bilinear_MLBTC"]),
    (["--link_function=relu"], ["relu", "softmax", "identity"]),
    (["--dtype=float8"], ["float8", "float32", "bfloat16", "float16"]),
    (["--device=gpu"], ["'gpu'", "--device=auto"]),
    (["--device=cuda:99"], ["'cuda:99'", "--device=auto"]),
    (["--n_head=3"], ["d_model 16", "n_head 3"]),
    (["--n_head=0"], ["n_head is 0"]),
    (["--n_head=-1", "--d_head=5"], ["d_model 16", "d_head 5"]),
    (["--n_kv_head=3", "--n_head=4"], ["n_kv_head 3", "n_head 4"]),
    (["--n_kv_head=0"], ["n_kv_head is 0"]),
    (["--d_qk_head=0"], ["d_qk_head is 0"]),
    (["--d_qk_head=-8"], ["d_qk_head is -8"]),
    (["--n_layer=0"], ["n_layer is 0"]),
    (["--d_model=0"], ["d_model is 0"]),
    (["--dropout=1.0"], ["dropout is 1.0"]),
    (["--batch_size=0"], ["batch_size is 0", "at least 1"]),
    (["--max_iters=-1"], ["max_iters is -1", "at least 0"]),
    (["--log_interval=0"], ["log_interval is 0", "at least 1"]),
    (["--eval_interval=0"], ["eval_interval is 0", "at least 1"]),
    (["--seed=-1"], ["seed is -1", "at least 0"]),
    (["--grad_clip=-1"], ["grad_clip is -1", "at least 0"]),
    (["--weight_decay=-0.1"], ["weight_decay is -0.1", "at least 0"]),
    (["--beta2=1.0"], ["beta2 is 1.0", "below 1"]),
    ([MLR, "--mlr_rank_list=4|a|2"], ["mlr_rank_list is '4|a|2'", '"8|4|4"']),
    ([MLR, "--mlr_rank_list=4||4"], ["mlr_rank_list is '4||4'"]),
    ([MLR, "--mlr_rank_list=4,4"], ["mlr_rank_list is '4,4'"]),
    ([MLR, "--mlr_rank_list="], ["mlr_rank_list is ''"]),
    ([MLR, "--mlr_rank_list=6|4|-2"], ["(6, 4, -2)", "from 0 on"]),
    ([MLR, "--mlr_rank_list=4|2|1"], ["(4, 2, 1)", "add up to 7", "8 features"]),
    ([MLR, "--mlr_rank_list=4|2|2", "--d_qk_head=12"], ["(4, 2, 2)", "add up to 8", "12 features"]),
    ([MLR, "--mlr_rank_list=4|4", "--mlr_block_size_list=16|8|4"], ["3 levels (16, 8, 4)", "2 (4, 4)"]),
    ([MLR, "--mlr_rank_list=4|2|2", "--mlr_block_size_list=16|8"], ["2 levels (16, 8)", "3 (4, 2, 2)"]),
    ([MLR, "--mlr_rank_list=4|4", "--mlr_block_size_list=16|0"], ["block of 0", "1 to block_size = 16"]),
    ([MLR, "--mlr_rank_list=4|4", "--mlr_block_size_list=17|8"], ["block of 17", "1 to block_size = 16"]),
    ([MLR, "--mlr_rank_list=4|4", "--mlr_block_size_list=16|half"], ["mlr_block_size_list is '16|half'"]),
    ([MLR, "--mlr_rank_list=4|2|2", "--block_size=18"], ["3 levels", "multiple of 4", "not 18", "16"]),
    ([MLR, "--mlr_divide_by_num_levels=True", "--mlr_block_divide_by_num_levels=True"], ["exclude each other"]),
    ([BILINEAR, "--mlr_rank_list=4|2|1"], ["(4, 2, 1)", "add up to 7", "8 features"]),
    ([BILINEAR, "--mlr_rank_list=4|2|1|1", "--d_model=12", "--n_head=1", "--d_qk_head=8"], ["d_model 12", "8 chunks"]),
    ([BILINEAR, "--mlr_rank_list=4|2|2", "--n_kv_head=1"], ["no grouped-query form", "n_kv_head 1", "n_head 2"]),
    (["--token_mixing_struct=bilinear_BTT", "--btt_tt_rank=0"], ["btt_tt_rank is 0"]),
    ([MLBTC, "--mlbtc_levels=4:4"], ["mlbtc_levels is '4:4'", "p:p':inner"]),
    ([MLBTC, "--mlbtc_levels=4:4:x"], ["mlbtc_levels is '4:4:x'"]),
    ([MLBTC, "--mlbtc_levels=4:4:8:skip"], ["mlbtc_levels is '4:4:8:skip'"]),
    ([MLBTC, "--mlbtc_levels=0:4:8"], ["mlbtc_levels is '0:4:8'"]),
    ([MLBTC, "--mlbtc_levels=4:4:8|"], ["mlbtc_levels is '4:4:8|'"]),
    ([MLBTC, "--mlbtc_levels=3:4:8"], ["3:4:8", "16", "3 equal blocks"]),
    ([MLBTC, "--mlbtc_family=tree"], ["'tree'", "butterfly"]),
    ([MLBTC, "--mlbtc_family=butterfly", "--d_model=12"], ["power of two", "12"]),
    (["--token_mixing_struct=low_rank_with_sliding_window", "--sliding_block_size=0"], ["sliding_block_size is 0"]),
    ([GSWA, "--gswa_rank_list=4|3"], ["(4, 3)", "add up to 7", "8 features"]),
    ([GSWA, "--gswa_rank_list=4|2|2"], ["gswa_rank_list", "(4, 2, 2)"]),
    ([GSWA, "--gswa_rank_list=8|0"], ["gswa_rank_list", "(8, 0)"]),
    ([SEQUENTIAL, "--sequential_GSWA_layer_list=MHA|SWA|SWA"], ["3 layers", "n_layer = 2"]),
    ([SEQUENTIAL, "--sequential_GSWA_layer_list=MHA"], ["1 layers", "n_layer = 2"]),
    ([SEQUENTIAL, "--sequential_GSWA_layer_list=MHA|GQA"], ["'GQA'", "MHA", "SWA"]),
    ([SEQUENTIAL, "--sequential_GSWA_layer_list="], ["sequential_GSWA_layer_list is ''", '"MHA|SWA"']),
]
LANGUAGE = [
    (["--init_from=gpt2"], ["gpt2 was not trained in µP", "config/nanogpt.py"]),
    (["--init_from=again"], ["no weights 'again'", "scratch, resume, auto, gpt2"]),
    (["--vocab_size=0"], ["vocab_size is 0", "at least 1, or -1"]),
    (["--vocab_size=50"], ["outside the vocabulary of 50"]),
    (["--min_lr=1e-5"], ["--min_lr=1e-5: min_lr means nothing unless decay_lr is given", "config/nanogpt.py"]),
    (["--gradient_accumulation_steps=0"], ["gradient_accumulation_steps is 0"]),
    (["--eval_iters=0"], ["eval_iters is 0"]),
    (["--init_lr=0"], ["init_lr is 0.0", "above 0"]),
    (["--block_size=0"], ["block_size is 0"]),
    (["--dataset=openwebtext_smal"], ["meta.json is missing", "data/openwebtext_small?", "python data/"]),
    (["--dataset=openwebtext"], ["meta.json is missing", "make it with: python data/openwebtext/prepare.py"]),
    (["--block_size=1000"], ["train.bin has 400 tokens", "block_size 1000", "1001"]),
    (["--block_size=400"], ["400 tokens", "401"]),
    (["--n_dims=4"], ["no setting 'n_dims'"]),
]
IN_CONTEXT = [
    (["--init_from=gpt2"], ["gpt2", "scratch", "resume", "auto"]),
    (["--n_dims=0"], ["n_dims is 0", "at least 1"]),
    (["--training_learning_rate=-1"], ["training_learning_rate is -1.0", "above 0"]),
    (["--n_positions=0"], ["n_positions is 0", "at least 1"]),
    (["--block_size=12"], ["block_size 12", "8 pairs"]),
    (["--training_task=sorting"], ["'sorting'", "linear_regression", "decision_tree"]),
    (["--training_num_training_examples=3"], ["batch of 4", "training_num_training_examples = 3"]),
    (["--training_curriculum_dims_start=5"], ["training_curriculum_dims_start", "1 to", "4", "got 5"]),
    (["--training_curriculum_dims_start=0"], ["training_curriculum_dims_start", "got 0"]),
    (["--training_curriculum_points_start=9"], ["training_curriculum_points_start", "8", "got 9"]),
    (["--training_curriculum_dims_end=5"], ["training_curriculum_dims_end is 5", "4"]),
    (["--training_curriculum_points_end=9"], ["training_curriculum_points_end is 9", "8"]),
    (["--training_curriculum_dims_inc=0"], ["training_curriculum_dims_inc", "at least 1", "got 0"]),
    (["--training_curriculum_points_interval=0"], ["training_curriculum_points_interval", "at least 1", "got 0"]),
    (
        ["--training_curriculum_adaptive_inc=True", "--training_curriculum_dims_inc=2"],
        ["training_curriculum_dims_inc is given", "--training_curriculum_adaptive_inc=False"],
    ),
    (
        ["--training_curriculum_adaptive_inc=True", "--training_curriculum_points_interval=3"],
        ["dims_interval 2 and points_interval 3", "make them equal"],
    ),
    (["--training_curriculum_warmup_ratio=1.5"], ["training_curriculum_warmup_ratio is 1.5", "from 0 to 1"]),
    (["--training_curriculum_warmup_ratio=nan"], ["takes a finite number, got nan"]),
    (["--training_curriculum_steps=0"], ["training_curriculum_steps is 0", "at least 1, or -1"]),
    (["--training_num_training_examples=0"], ["training_num_training_examples = 0"]),
    (["--noise_std=-1"], ["noise_std", "-1"]),
    (["--noise_std=1", "--training_task=linear_classification"], ["noise_std", "linear_classification"]),
    (["--task_sparsity=0", "--training_task=sparse_linear_regression"], ["sparsity", "at least 1", "got 0"]),
    (["--task_hidden=0", "--training_task=relu_2nn_regression"], ["hidden", "at least 1", "got 0"]),
    (["--task_depth=0", "--training_task=decision_tree"], ["depth", "at least 1", "got 0"]),
    (["--eval_prompts=0"], ["eval_prompts is 0"]),
    (["--eval_batch_size=0"], ["eval_batch_size is 0"]),
    (["--dataset=text"], ["no setting 'dataset'"]),
]
CASES = [
    *(("train.py", *case) for case in BOTH + LANGUAGE),
    *(("train_ICL.py", *case) for case in BOTH + IN_CONTEXT),
]


@pytest.mark.parametrize(("script", "arguments", "words"), CASES, ids=[f"{s}-{' '.join(a)}" for s, a, _ in CASES])
def test_bad_settings(script, arguments, words, refused):
    message = refused(script, *arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer = 2\nn_head = = 3\n", [", line 2: "]),
        ("n_layer = 2\nn_heads = 3\n", ["no setting 'n_heads'", "did you mean 'n_head'?"]),
        ("n_layer = '2'\n", ["n_layer takes int, got '2'"]),
        ("compile = 1\n", ["compile takes bool, got 1"]),
        ("n_layer = layers\n", ["NameError", "layers"]),
        ("from math import sqrt\n", ["sets nothing", "name = value"]),
        ("n_layer = 0\n", ["n_layer is 0"]),
    ],
    ids=["syntax", "unknown", "string", "bool", "name", "import", "range"],
)
def test_bad_config_files(script, text, words, refused, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(text)
    message = refused(script, str(file))
    for word in words:
        assert word in message
    if "is 0" not in words[0]:
        assert message.startswith(str(file))


def test_a_config_file_that_is_a_folder_or_binary(refused, tmp_path):
    assert "no config file" in refused("train.py", str(tmp_path))
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / "bad.py") in refused("train.py", str(tmp_path / "bad.py"))


def test_the_exit_status_of_the_whole_command(tmp_path):
    command = [sys.executable, "train_ICL.py", "--n_dimensions=3", f"--out_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: --n_dimensions=3: no setting 'n_dimensions', did you mean 'n_dims'?\n"
    assert not (tmp_path / "run").exists()


def test_a_sequence_longer_than_block_size():
    cfg = train.Settings(n_layer=1, n_head=2, d_model=16, block_size=16).model_config()
    with pytest.raises(BadInput, match="17 tokens does not fit block_size = 16"):
        GPT(cfg, 96)(torch.zeros(1, 17, dtype=torch.long))


# --- bad data ---


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def foreign_id(folder):
    ids = np.fromfile(folder / "train.bin", np.uint8)
    ids[7] = 96
    ids.tofile(folder / "train.bin")


def meta(**changes):
    def change(folder):
        before = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**before, **changes}))

    return change


BAD_DATA = {
    "no meta": (remove("meta.json"), ["meta.json is missing", "make one with: python data/NAME/prepare.py"]),
    "no train": (remove("train.bin"), ["train.bin is missing", "python data/"]),
    "no val": (remove("val.bin"), ["val.bin is missing", "python data/"]),
    "no folder": (shutil.rmtree, ["meta.json is missing"]),
    "empty": (cut("train.bin", 0), ["train.bin has 0 bytes", "400 tokens"]),
    "truncated": (cut("val.bin", 399), ["val.bin has 399 bytes", "400 tokens"]),
    "cut meta": (cut("meta.json", 20), ["meta.json is damaged"]),
    "foreign id": (foreign_id, ["train.bin: token 7 is 96", "vocabulary of 96"]),
    "vocab_size": (meta(vocab_size=0), ["vocab_size"]),
    "dtype": (meta(dtype="uint32"), ["uint32", "uint8"]),
    "tokenizer": (meta(tokenizer="words"), ["'words'"]),
}


@pytest.mark.parametrize("damage", BAD_DATA)
def test_bad_data(damage, refused, data_dir):
    make, words = BAD_DATA[damage]
    make(data_dir / "text")
    message = refused("train.py")
    for word in words:
        assert word in message


# --- bad checkpoints and folders ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of each script, and its data."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "data" / "text")
    train.main(flags(TINY_LM, data_dir=folder / "data", out_dir=folder / "train.py", max_iters=2))
    train_ICL.main(flags(TINY_ICL, out_dir=folder / "train_ICL.py"))
    return folder


@pytest.fixture
def run_of(finished, tmp_path):
    """A copy of the finished run of a script."""
    return lambda script: Path(shutil.copytree(finished / script, tmp_path / "old"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_holds_a_run(script, run_of, refused, data_dir, tmp_path):
    out_dir = run_of(script)
    message = refused(script, out_dir=out_dir, max_iters=2)
    for word in (str(out_dir), "--init_from=resume", "--overwrite=True", "--out_dir"):
        assert word in message
    (out_dir / "ckpt.pt").unlink()
    assert "holds a run" in refused(script, out_dir=out_dir, max_iters=2)
    tiny = TINY_ICL if script == "train_ICL.py" else dict(TINY_LM, data_dir=data_dir)
    SCRIPTS[script].main(flags(tiny, out_dir=out_dir, overwrite=True, seed=3))
    SCRIPTS[script].main(flags(tiny, out_dir=tmp_path / "new", seed=3))
    assert_same_checkpoint(out_dir, tmp_path / "new")
    assert record(out_dir)["resumed"] == []


def test_an_out_dir_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").write_text("here")
    assert "is a file" in refused("train.py", out_dir=tmp_path / "file")
    assert "cannot make out_dir" in refused("train.py", out_dir=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "here"


DAMAGES = {
    "missing": (lambda path: path.unlink(), ["no checkpoint", "--init_from=scratch"]),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), ["cannot be read as a checkpoint"]),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), ["cannot be read"]),
    "empty": (lambda path: path.write_bytes(b""), ["cannot be read as a checkpoint"]),
    "garbage": (lambda path: path.write_bytes(b"garbage" * 100), ["cannot be read as a checkpoint"]),
    "text": (lambda path: path.write_text("hello"), ["cannot be read as a checkpoint"]),
    "foreign": (lambda path: torch.save({"model": {}}, path), ["is not a checkpoint of this project"]),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), ["is not a checkpoint of this project"]),
    "code": (lambda path: torch.save({"settings": Example()}, path), ["cannot be read as a checkpoint"]),
    "only weights": (lambda path: keep(path, "settings", "step", "model"), ["has no optimizer"]),
    "other weights": (lambda path: rename_weight(path), ["trunk.ln_f.weight", "nothing", "(16,)"]),
}


def keep(path, *names):
    state = torch.load(path, weights_only=True)
    torch.save({name: state[name] for name in names}, path)


def rename_weight(path):
    state = torch.load(path, weights_only=True)
    state["model"]["other"] = state["model"].pop("trunk.ln_f.weight")
    torch.save(state, path)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("init_from", ["resume", "auto"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_checkpoints(damage, init_from, script, run_of, refused):
    out_dir = run_of(script)
    make, words = DAMAGES[damage]
    make(out_dir / "ckpt.pt")
    if (damage, init_from) == ("missing", "auto"):
        return  # starts anew
    message = refused(script, init_from=init_from, out_dir=out_dir)
    assert str(out_dir / "ckpt.pt") in message
    for word in words:
        assert word in message
    if "read as" in message or "not a checkpoint" in message:
        assert message.endswith("; begin again with --init_from=scratch --overwrite=True")


def test_a_run_that_is_to_be_evaluated_is_resumed(run_of, refused):
    message = refused("train.py", out_dir=run_of("train.py"), eval_only=True)
    assert message.endswith("holds a run already; evaluate it by --init_from=resume")


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [
        ("train.py", dict(init_lr=0.5, dropout=0.0), ["dropout = 0.2", "dropout = 0.0"]),  # the first that differs
        ("train.py", dict(d_model=32), ["d_model = 16", "d_model = 32"]),
        ("train.py", dict(seed=3), ["seed = 1337", "seed = 3"]),
        ("train.py", dict(batch_size=3), ["batch_size = 2", "batch_size = 3"]),
        ("train.py", dict(token_mixing_struct="bilinear_BTT"), ["'low_rank'", "'bilinear_BTT'"]),
        ("train_ICL.py", dict(n_dims=3, training_curriculum_dims_start=3), ["n_dims = 4", "n_dims = 3"]),
        ("train_ICL.py", dict(training_curriculum_dims_inc=2), ["dims_inc = -1", "dims_inc = 2"]),
    ],
)
def test_a_checkpoint_of_other_settings(script, settings, words, run_of, refused):
    message = refused(script, init_from="resume", out_dir=run_of(script), **settings)
    for word in words:
        assert word in message


@pytest.mark.parametrize(("theirs", "ours"), [("train.py", "train_ICL.py"), ("train_ICL.py", "train.py")])
def test_a_checkpoint_of_the_other_script(theirs, ours, run_of, refused):
    assert "ckpt.pt was made with" in refused(ours, init_from="resume", out_dir=run_of(theirs))


def test_a_newer_setting_is_named(run_of, refused):
    out_dir = run_of("train.py")
    state = checkpoint(out_dir)
    del state["settings"]["bias"]
    torch.save(state, out_dir / "ckpt.pt")
    message = refused("train.py", init_from="resume", out_dir=out_dir)
    assert "was made without bias, this run has bias = False" in message


# --- small pure functions ---


def test_the_learning_rate_as_a_function_of_the_step():
    assert [lr_factor(step, 4) for step in (0, 1, 3, 4, 1000)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert lr_factor(0, 0) == 1.0
    cosine = [lr_factor(step, 10, 110, 0.1) for step in (10, 60, 110, 500)]
    assert cosine == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert lr_factor(5, 5, 5, 0.1) == pytest.approx(1.0)  # no room to decay in


@pytest.mark.parametrize(("seconds", "want"), [(0, "0m00s"), (61.9, "1m01s"), (1545, "25m45s"), (12345, "3h25m")])
def test_times(seconds, want):
    assert format_time(seconds) == want
