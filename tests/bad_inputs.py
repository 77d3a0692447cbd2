"""Settings, records and checkpoints that cannot be: every one of a few thousand ends with one line, or is taken.

A command is taken if its run comes to the point where it would write its first file; until then it may write nothing.
What is refused ends with status 2 and one line on stderr. Anything else, a traceback above all, is a fault.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import random
import runpy
import socket
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from matplotlib.figure import Figure
from runs import TINY, TINY_ICL, TINY_LM, flags, waves, write_corpus, write_series

import bench
import evaluate_ICL
import forecast
import forecast_TS
import sample
import train
import train_chronos
import train_ICL
import train_TS
from plots import (
    attention_speed,
    hf_table,
    icl_compute,
    icl_examples,
    icl_table,
    icl_width,
    ledger,
    lm_compute,
    lm_curves,
    lm_laws,
    lm_levels,
    lm_pairs,
    lm_rates,
    lm_table,
    speed_table,
    ts_forecasts,
    ts_horizon,
    ts_pairs,
    ts_table,
)  # fmt: skip
from scripts import collect
from training.run import Run

ROOT = Path(__file__).resolve().parents[1]
TINY_TS = dict(TINY, look_back=16, horizon=5, batch_size=8, init_lr=3e-4, mlr_rank_list="4|2|2")
TINY_CHRONOS = dict(
    look_back=16, horizon=5, n_layer=1, d_model=16, n_head=2, d_head=8, d_ff=16, n_tokens=32, batch_size=2, max_iters=2,
    eval_interval=2, eval_windows=2, num_samples=2, mlr_rank_list="4|2|2", device="cpu",
)  # fmt: skip
ROWS = (90, 40, 30)
MLR = dict(token_mixing_struct="multi_level_low_rank", mlr_rank_list="4|2|2")
WORDS = ["", "x", "None", "a|b", "é", "/", "-", "4|", "|", "1:2:3", "8|x", "\x00", "a\nb", "a" * 300]
NUMBERS = [
    "nan", "inf", "-inf", "1e999", "-1", "-2", "0", "0.5", "-0.5", "1e-400", "1000000000", "2147483648",
    "4611686018427387904", "9223372036854775808", "-9223372036854775809",
]  # fmt: skip
STANDS_FOR = dict(n_head="d_head", dataset="meta.json", out="write", d_model="widths")
COUNTS = ("max_new_tokens", "prompts", "num_samples")  # of what a reader does
DEVICES = ["meta", "cuda:99", "tpu", "cuda:-1"]
LINES = ["[]", "3", "null", "{}", '{"step": "x"}', '{"step": -1}', '{"step": 1e999}', '{"step": 2', '{"step": [1]}']
RECORDS = ["", "null", "[]", "{}", "3", "{", '{"settings": null}', '{"settings": [], "command": 3}']


class Taken(Exception):
    """The run would begin to write now."""


class Place:
    """A folder with data, and two finished runs of each training script, of two structures."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "file").write_text("here")
        write_corpus(folder / "text")
        write_series(folder / "ETTh1", waves(sum(ROWS)), ROWS)
        self.base = {
            train: dict(TINY_LM, data_dir=folder),
            train_ICL: dict(TINY_ICL),
            train_TS: dict(TINY_TS, data_dir=folder),
        }
        self.runs = {script: folder / f"run_{script.__name__}" / "one" for script in self.base}
        with contextlib.redirect_stdout(io.StringIO()):
            for script, out_dir in self.runs.items():
                script.main(flags(self.base[script], out_dir=out_dir))
                script.main(flags(self.base[script], MLR, out_dir=out_dir.with_name("two")))

    def outcome(self, main, argv, untouched=None, named=()):
        """None if all is well, else what is wrong with how main(argv) ends; a refusal has one of the words `named`."""
        error = io.StringIO()
        before = listing(untouched)
        try:
            with (
                mock.patch.object(Run, "start", side_effect=Taken),
                mock.patch.object(bench, "line", side_effect=Taken),  # of the columns, before anything is measured
                mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
                mock.patch.object(Figure, "savefig"),
                mock.patch.object(Figure, "draw_without_rendering"),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(error),
            ):
                main([str(arg) for arg in argv])
        except Taken:
            pass
        except SystemExit as end:
            lines = error.getvalue().splitlines()
            if end.code not in (0, None) and not (end.code == 2 and lines and lines[-1].count("error: ") == 1):
                return f"status {end.code}: {lines[-3:]}"
            if named and lines and not any(word in lines[-1] for word in named):
                return f"none of {named} is named: {lines[-1]}"
            if len(lines) > 1 and not lines[0].startswith("usage:"):
                return f"{len(lines)} lines: {lines[:3]}"
        except BaseException as wrong:
            return f"{type(wrong).__name__}: {str(wrong)[:200]}"
        return None if listing(untouched) == before else f"{untouched} was written"


def listing(folder):
    """What stands in a folder, but for what the run that owns it says of itself."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder and folder.exists() else []
    return {path: path.stat()[6:9:2] for path in files if path.name != "owner.json"}


def settings_cases(place):
    """(main, command, the folder that must not be touched) for every setting of every script and every bad value."""
    readers = {
        sample: dict(out_dir=place.runs[train], max_new_tokens=2, num_samples=1, device="cpu"),
        evaluate_ICL: dict(out_dir=place.runs[train_ICL], prompts=2, device="cpu"),
        forecast_TS: dict(out_dir=place.runs[train_TS], windows="0", out=place.folder / "forecasts.json"),
        forecast: dict(out_dir=place.runs[train_TS], out=place.folder / "forecast.csv"),
    }
    chronos = {train_chronos: dict(TINY_CHRONOS, data_dir=place.folder)} if find_spec("chronos") else {}
    bases = place.base | chronos | readers
    for script, base in bases.items():
        untouched = base["out_dir"] if script in readers else place.folder / "new"
        where = {} if script in readers else dict(out_dir=untouched)
        for field in dataclasses.fields(script.Settings):
            for value in [*NUMBERS, *WORDS, *(DEVICES if field.name == "device" else [])]:
                if script in readers and field.name in COUNTS and big(value):
                    continue  # would be done as asked
                yield script.main, flags(base, where, {field.name: value}), untouched, words_for(field.name, value)


def bench_cases(place):
    """The same for the commands of bench.py, which come to the head of their table."""
    for command, module in bench.COMMANDS.items():
        for field in dataclasses.fields(module.Settings):
            for value in [*NUMBERS, *WORDS, *(DEVICES if field.name == "device" else [])]:
                argv = [command, *flags(dict(device="cpu"), {field.name: value})]
                yield bench.main, argv, None, words_for(field.name, value)


def words_for(name, value):
    """What a refusal of the setting may name: the setting, its last word, its value, or what it stands for."""
    return [name, name.rpartition("_")[2], STANDS_FOR.get(name, name), *filter(None, [value.replace("\n", " ")])]


def big(value):
    return value in NUMBERS and value not in ("nan", "inf", "-inf", "1e999") and float(value) >= 1e6


TABLES = {  # what reads runs of a script: (main, flags)
    train: [(lm_table, []), (lm_table, ["--by-width"]), (lm_laws, []), (lm_pairs, []), (lm_rates, []), (lm_curves, [])],
    train_ICL: [(icl_table, ["--ledger", "--steps=4", "--errors=0.5"])],
    train_TS: [(ts_table, []), (ts_pairs, [])],
}
FIGURES = {
    train: [(lm_compute, []), (lm_compute, ["--fit"]), (lm_levels, []), (lm_curves, [])],
    train_ICL: [(icl_compute, []), (icl_examples, []), (icl_width, [])],
    train_TS: [(ts_horizon, [])],
}


def record_cases(place):
    """Every damage of a record, before the tables and figures of its runs, a collection of them and a resume."""
    picture = place.folder / "a.png"
    for script, out_dir in place.runs.items():
        damages = [
            *damaged(out_dir / "run.json", of_run, RECORDS),
            *damaged(out_dir / "metrics.jsonl", of_metrics, LINES),
        ]
        for number, damage in enumerate(damages):
            with damage:
                for module, more in [*TABLES[script], (ledger, [])]:
                    yield module.main, [out_dir.parent, *more], out_dir
                if number % 5 == 0:  # drawing takes its time
                    for module, more in FIGURES[script]:
                        yield module.main, [out_dir.parent, *more, "--out", picture], out_dir
                yield collect.main, [out_dir.parent, place.folder / "collected"], out_dir
                yield script.main, flags(place.base[script], out_dir=out_dir, init_from="resume", max_iters=8), out_dir


def data_cases(place):
    """Every damage of what describes a corpus and a series, and of what says who owns a folder."""
    for script, folder in ((train, place.folder / "text"), (train_TS, place.folder / "ETTh1")):
        for name in ("meta.json", "verified.json"):
            if (folder / name).exists():
                for damage in damaged(folder / name, of_json, RECORDS):
                    with damage:
                        yield script.main, flags(place.base[script], out_dir=place.folder / "new"), place.folder / "new"
    for script, out_dir in place.runs.items():
        owner = dict(pid=2**22 + 1, host=socket.gethostname(), since="2026-01-01 00:00:00")
        (out_dir / "owner.json").write_text(json.dumps(owner))
        for damage in damaged(out_dir / "owner.json", of_json, RECORDS):
            with damage:
                yield script.main, flags(place.base[script], out_dir=out_dir, init_from="resume", max_iters=8), out_dir


def bench_record_cases(place):
    """Every damage of the records that bench.py and forecast_TS.py write, before what draws them."""
    picture = ["--out", place.folder / "a.png"]
    record = place.folder / "forecasts.json"
    with contextlib.redirect_stdout(io.StringIO()):
        forecast_TS.main(flags(dict(out_dir=place.runs[train_TS], windows="0|3", out=record)))
    readers = {record: [(ts_forecasts, picture)]}
    for path in [*sorted((ROOT / "results" / "bench").glob("*.json")), ROOT / "results/hf/llama_seed1.json"]:
        copied = place.folder / path.name
        copied.write_bytes(path.read_bytes())
        readers[copied] = [(speed_table, []), *([(attention_speed, picture)] if "attention" in path.name else [])]
    readers[copied] = [(hf_table, [])]
    for path, mains in readers.items():
        for damage in damaged(path, of_nested, RECORDS):
            with damage:
                for module, more in mains:
                    yield module.main, [path, *more], None


def damaged(path, changes, contents):
    """Contexts, each of another damage to a file, which is whole again behind it."""
    whole = path.read_bytes()
    damages = [c.encode() for c in contents] + [b"\xff\xfe" + whole[:40], whole[: len(whole) // 2], b""]
    return [instead(path, whole, damage) for damage in [*damages, *changes(whole)]]


@contextlib.contextmanager
def instead(path, whole, damage):
    path.write_bytes(damage)
    try:
        yield
    finally:
        path.write_bytes(whole)


def of_json(whole):
    """A JSON object without each of its keys, and with each of them another type."""
    for changed in others(json.loads(whole)):
        yield json.dumps(changed).encode()


def of_nested(whole):
    """The same for the object, and for the first object of each list in it, and of each list in that."""
    record = json.loads(whole)
    for changed in others(record):
        yield json.dumps(changed).encode()
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for changed in of_nested(json.dumps(value[0])):
                yield json.dumps({**record, key: [json.loads(changed), *value[1:]]}).encode()


def of_run(whole):
    """A run.json without each of its keys, with each of them another type, and with settings of another type."""
    record = json.loads(whole)
    for changed in others(record):
        yield json.dumps(changed).encode()
    for changed in others(record["settings"], (None, "x")):
        yield json.dumps({**record, "settings": changed}).encode()


def of_metrics(whole):
    """A metrics.jsonl with another line at its end, and with values of another type in its first and last."""
    for line in LINES:
        yield whole + line.encode() + b"\n"
    lines = whole.splitlines()
    for place in (0, len(lines) - 1):
        for changed in others(json.loads(lines[place])):
            yield b"\n".join([*lines[:place], json.dumps(changed).encode(), *lines[place + 1 :], b""])


def others(record, kinds=(None, 3, "x", [], {})):
    """A dict without each of its keys, and with each of them another type."""
    for key in record:
        yield {k: v for k, v in record.items() if k != key}
        for other in kinds:
            yield {**record, key: other}


def checkpoint_cases(place):
    """Every entry of a checkpoint gone, or of another type; a setting of its own that nobody knows."""
    readers = {
        train: (sample.main, dict(num_samples=1, max_new_tokens=2, device="cpu")),
        train_ICL: (evaluate_ICL.main, dict(prompts=2, device="cpu")),
        train_TS: (forecast_TS.main, dict(windows="0", out=place.folder / "forecasts.json")),
    }
    for script, out_dir in place.runs.items():
        path = out_dir / "ckpt.pt"
        whole, state = path.read_bytes(), torch.load(path, weights_only=True)
        changed = [{k: v for k, v in state.items() if k != key} for key in state]
        changed += [{**state, key: other} for key in state for other in (None, 3, "x", [], {})]
        changed += [{**state, key: {**inner, name: other}} for key in state if isinstance(inner := state[key], dict)
                    for name in inner for other in ((None, "x") if key == "settings" else (None,))]  # fmt: skip
        changed += [{**state, "settings": {**state["settings"], **more}} for more in ({"new": 1}, {"d_model": "x"})]
        for damaged in changed:
            path.unlink()  # best.pt may be another name of it
            torch.save(damaged, path)
            yield script.main, flags(place.base[script], out_dir=out_dir, init_from="resume", max_iters=8), out_dir
            main, few = readers[script]
            yield main, flags(few, out_dir=out_dir), out_dir
        path.unlink()
        path.write_bytes(whole)


def path_cases(place):
    """Places where no run can be."""
    for script, base in place.base.items():
        file = place.folder / "file"
        for out_dir in (file, file / "below", "a" * 300, "a\x00b", "/proc/none/x", ""):
            yield script.main, flags(base, out_dir=out_dir), None
        for data_dir in (file, place.folder / "none", "a\x00b", ""):
            yield script.main, flags(base, data_dir=data_dir, out_dir=place.folder / "new"), place.folder / "new"


def command_cases(place):
    """Grids by every setting, figures and tables by what they are given, and the corpora's --input and --out."""
    for grid in ("icl_regression", "language_modeling", "time_series"):
        sweep = importlib.import_module(f"scripts.{grid}.sweep")
        for field in dataclasses.fields(sweep.Settings):
            for value in [*NUMBERS, *WORDS, "[", "'", "--x"]:
                yield sweep.main, [f"--{field.name}={value}"], None
    file, none = place.folder / "file", place.folder / "none"
    for path in sorted((ROOT / "plots").glob("*.py")):
        figure = importlib.import_module(f"plots.{path.stem}")
        if not hasattr(figure, "main") or path.stem == "readme":  # which writes the repository's own pages
            continue
        for argv in ([], [none], [file], [place.folder], ["a" * 300], ["--help"], ["--only", "x"], ["--x"]):
            yield figure.main, [*argv, *(["--out", file / "a.png"] if argv and argv[0] != "--help" else [])], None
    for corpus in ("shakespeare_char", "openwebtext", "openwebtext_small", "pydocs", "shakespeare", "ett", "csv"):
        prepare = runpy.run_path(str(ROOT / "data" / corpus / "prepare.py"))["main"]
        outs = (["--out", file], ["--out", file / "below"])
        for argv in (["--help"], ["--x"], *outs, ["--input", none], ["--input", ""]):
            yield prepare, [*argv, *(["--out", none] if "--input" in argv else [])], none


def table_cases(place):
    """CSVs that hold no series, and every flag of data/csv/prepare.py with what it cannot be."""
    prepare = runpy.run_path(str(ROOT / "data" / "csv" / "prepare.py"))["main"]
    path, new = place.folder / "a.csv", place.folder / "series"
    good = "date,x,y\n" + "".join(f"2020-01-{day:02},{day},{day * day}\n" for day in range(1, 31))
    lines = good.splitlines(keepends=True)
    for number, line in enumerate(lines):
        others = [
            "", "\n", "x\n", ",,\n", line.replace(",", ";"), line * 2, "2020-01-01" + line[10:], "0" + line,
            line.replace(",", ",z", 1), line.replace(",", ",1e99", 1), line[:-1] + ",1\n", "\"" + line,
        ]  # fmt: skip
        for other in others:
            if other != line:
                path.write_text("".join([*lines[:number], other, *lines[number + 1 :]]))
                yield prepare, ["--input", path, "--out", new, "--splits", "0.4|0.3|0.3"], None
    for text in ("", "\n", "date,x\n", "x\n1\n", "date,x\n2020-01-01,1\n", "\x00", "a,a\n1,2\n3,4\n", "1\n" * 5):
        path.write_text(text)
        yield prepare, ["--input", path, "--out", new], None
    path.write_text(good)
    splits = ["0.5|0.5|0.5", "2019-01-01|2020-01-05", "2020-01-09|2020-01-05"]
    for flag in ("--time", "--frequency", "--missing", "--splits"):
        for value in [*NUMBERS, *WORDS, *splits, "date", "y", "ME"]:
            yield prepare, ["--input", path, "--out", new, flag, value], None
    for value in ("\x00", "a" * 300, path, path / "below", "/proc/none/x"):
        yield prepare, ["--input", path, "--out", value], None
    yield prepare, ["--input", place.folder, "--out", new], None


KINDS = dict(
    commands=command_cases, settings=settings_cases, bench=bench_cases, paths=path_cases, records=record_cases,
    data=data_cases, tables=table_cases, bench_records=bench_record_cases, checkpoints=checkpoint_cases,
)  # fmt: skip


def table(folder, share=1.0):
    """[(kind, tried, [(command, what is wrong), ..])] of a share of the cases, with `folder` as the working folder."""
    with contextlib.chdir(folder):
        return _table(folder, share)


def _table(folder, share):
    place, rows, drawn = Place(folder), [], random.Random(0)
    for kind, cases in KINDS.items():
        tried, wrong = 0, []
        for main, argv, untouched, *named in cases(place):
            if drawn.random() < share:
                tried += 1
                if problem := place.outcome(main, argv, untouched, *named):
                    wrong.append((f"{main.__module__} {' '.join(map(str, argv[-3:]))!r}", problem))
        rows.append((kind, tried, wrong))
    return rows
