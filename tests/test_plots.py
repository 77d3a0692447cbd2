"""Figures from synthetic run records: what is drawn is what was recorded, and what is missing is named."""

import dataclasses
import itertools
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import train
import train_ICL
import train_TS
from plots import (
    attention_speed,
    icl_compute,
    icl_examples,
    icl_table,
    icl_width,
    lm_compute,
    lm_curves,
    lm_laws,
    lm_levels,
    lm_pairs,
    lm_rates,
    lm_table,
    speed_table,
    style,
)
from plots.names import ICL_SIZES, IGNORED, STRUCTURES
from plots.records import Curve, by_kind, by_setting, envelope, group, learning_curves, read_runs, select, tuned
from plots.style import line_styles, tick_text
from plots.tables import student
from structured import STRUCTURES as SCORING
from training.errors import BadInput
from training.records import load_run

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train_ICL.py": train_ICL.Settings, "train.py": train.Settings}
STEPS = (0, 100, 200, 300)
COLOURS = {structure: colour for structure, (_, colour, _) in STRUCTURES.items()}


def write_run(folder, script, lines, status="finished", **settings):
    """A record as training/run.py writes it."""
    cfg = SCRIPTS[script](out_dir=str(folder), **settings)
    argv = [script, *(f"--{k}={v}" for k, v in settings.items()), f"--out_dir={folder}"]
    record = dict(command=script, argv=argv, settings=dataclasses.asdict(cfg), status=status)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def spent(step, width=64):
    cost = step * 1e9 * width**2
    return dict(step=step, seconds=0.1 * step + 1e-4, compute=1.2 * cost, non_emb_compute=cost, paper_compute=cost / 6)


def write_icl(folder, seed=1, scale=1.0, steps=STEPS, drop=(), status="finished", **settings):
    settings = dict(n_dims=4, n_positions=8, max_iters=STEPS[-1], seed=seed, training_learning_rate=1e-3) | settings
    points, lines = settings["n_positions"], []
    for step in steps:
        errors = [scale * 0.5 ** (i * step / 300) for i in range(points)]
        baselines = dict(
            least_squares=[max(1 - i / 4, 1e-14) for i in range(points)],
            ridge=[1 / (1 + i) for i in range(points)],
            averaging=[1.0, *[4 / i for i in range(1, points)]],
            nearest_neighbours=[1 - 0.05 * i for i in range(points)],
            zero=[1.0] * points,
        )
        evaluation = {"eval_pointwise/loss": errors, "eval/last": errors[-1], "baselines": baselines}
        lines += [{**spent(step, settings.get("d_model", 128)), "overall_loss": 0.7, "lr": 1e-3}]
        lines += [{**spent(step, settings.get("d_model", 128)), **evaluation}]
    lines = [{k: v for k, v in line.items() if k not in drop} for line in lines]
    return write_run(folder, "train_ICL.py", lines, status, **settings)


def write_lm(
    folder, width=256, scale=1.0, exponent=0.05, seed=1, pace=5e4, steps=STEPS, status="finished",
    val_tokens=None, **settings,
):  # fmt: skip
    """Loss 20 C^-exponent; 1,000 tokens a step at 0.01 times `pace` in the first progress line, then 1, 2, 4.

    val_tokens: of the validation text, where the loss is that of the same text in every run.
    """
    lines = []
    for step in steps:
        cost = spent(step, width) | dict(tokens=1000 * step)
        loss = scale * 20 * max(cost["non_emb_compute"], 1.0) ** -exponent
        rate = pace * (2 ** (step / 100 - 1) if step else 0.01)
        lines += [{**cost, "train/loss": loss, "lr": 3e-3, "tokens_per_s": rate, "mfu": None}]
        lines += [{**cost, "val/loss": loss} | ({"val/tokens": val_tokens} if val_tokens else {})]
    settings = dict(d_model=width, seed=seed, max_iters=STEPS[-1], dataset="shakespeare_char") | settings
    return write_run(folder, "train.py", lines, status, **settings)


def axes():
    return Figure().subplots()


def drawn(ax):
    """{label: (x, y)} of the lines that have a label of their own."""
    return {line.get_label(): line.get_data() for line in ax.lines if not line.get_label().startswith("_")}


def refusal(capsys, main, *argv):
    """The one message with which a figure refuses, having written nothing."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in argv])
    assert end.value.code == 2
    return capsys.readouterr().err


FIGURES = {"icl_compute": (icl_compute.main, write_icl), "icl_examples": (icl_examples.main, write_icl),
           "icl_width": (icl_width.main, write_icl), "lm_compute": (lm_compute.main, write_lm)}  # fmt: skip


@pytest.mark.parametrize(("main", "write"), FIGURES.values(), ids=FIGURES)
def test_pictures_are_written_and_have_the_same_bytes_every_time(main, write, tmp_path, capsys):
    for structure in ("low_rank", "bilinear_BTT"):
        for seed in (1, 2):
            folder = tmp_path / "runs" / structure / str(seed)
            write(folder, seed=seed, token_mixing_struct=structure, scale=0.9 + seed / 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main([str(tmp_path / "runs"), "--out", str(tmp_path / "new" / "a.png")])
        main([str(tmp_path / "runs"), "--out", str(tmp_path / "new" / "b")])
    a, b = tmp_path / "new" / "a", tmp_path / "new" / "b"
    assert a.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert a.with_suffix(".svg").read_bytes() == b.with_suffix(".svg").read_bytes()
    assert "<dc:date>" not in a.with_suffix(".svg").read_text()
    out = capsys.readouterr().out
    assert str(a.with_suffix(".png")) in out
    assert str(a.with_suffix(".svg")) in out
    rows = [line for line in out.splitlines() if line.startswith(("standard", "bilinear BTT"))]
    assert len(rows) == 4
    assert "1 2" in rows[0]


@pytest.mark.parametrize("x", ["non_emb_compute", "compute", "paper_compute", "seconds", "step"])
def test_icl_compute_draws_the_record_from_the_first_step_on(x, tmp_path):
    run = load_run(write_icl(tmp_path / "a"))
    curves = learning_curves([run], "eval/last", x)
    icl_compute.draw(ax := axes(), curves, x, line_styles(curves))
    style.legend(ax, curves)
    lines = [line for line in run.metrics if "eval/last" in line and line["step"] > 0]
    np.testing.assert_allclose(drawn(ax)["standard"], [[m[x] for m in lines], [m["eval/last"] for m in lines]])
    assert curves[0].steps == [100, 200, 300]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_ylabel() == "mean squared error\nafter 7 examples"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["standard"]


def test_icl_examples_draws_the_last_evaluation_and_every_baseline(tmp_path):
    run = load_run(write_icl(tmp_path / "a"))
    icl_examples.draw(ax := axes(), tuned([run]))
    last, lines = run.metrics[-1], drawn(ax)
    np.testing.assert_allclose(lines["standard"], [range(8), last["eval_pointwise/loss"]])
    for key, words in icl_examples.BASELINES.items():
        np.testing.assert_allclose(lines[words], [range(8), last["baselines"][key]])
    shown = {t.get_text().rstrip(" ↓↑") for t in ax.texts}
    assert shown == set(icl_examples.BASELINES.values())
    assert ax.get_ylim()[0] > 1e-4  # exact least squares does not set the scale


def test_seeds_are_averaged_where_all_were_evaluated(tmp_path):
    write_icl(tmp_path / "a", seed=1, scale=1.0, eval_interval=100)
    write_icl(tmp_path / "b", seed=2, scale=3.0, eval_interval=300, steps=(0, 300), device="cpu")
    runs = read_runs([tmp_path], "train_ICL.py")
    (curve,) = learning_curves(runs, "eval/last", "step")
    want = 0.5**7
    assert (curve.steps, curve.seeds) == ([300], [1, 2])
    np.testing.assert_allclose([curve.mean, curve.low, curve.high], [[2 * want], [want], [3 * want]])
    icl_examples.draw(ax := axes(), tuned(runs))
    np.testing.assert_allclose(drawn(ax)["standard"][1], [2 * 0.5**i for i in range(8)])
    assert len(ax.collections) == 1  # the band


def test_labels_name_what_tells_curves_apart_and_no_more(tmp_path):
    for width in (64, 128):
        flags = dict(token_mixing_struct="low_rank", d_model=width, training_learning_rate=width / 1e5)
        write_icl(tmp_path / f"s{width}", **flags)
        for rank in (1, 2):
            flags = dict(token_mixing_struct="bilinear_BTT", d_model=width, btt_tt_rank=rank)
            write_icl(tmp_path / f"b{width}{rank}", **flags)
    runs = read_runs([tmp_path], "train_ICL.py")
    curves = learning_curves(runs, "eval/last", "step")
    labels = [curve.label for curve in curves]
    assert labels == ["standard, D = 64", "standard, D = 128"] + [
        f"bilinear BTT, D = {width}, btt_tt_rank = {rank}" for width in (64, 128) for rank in (1, 2)
    ]
    style.draw_curves(ax := axes(), curves, markers=lambda n: [n - 1])
    style.legend(ax, curves)
    assert list(drawn(ax)) == labels
    looks = {str((line.get_color(), line._dash_pattern)) for line in ax.lines if line.get_linestyle() != "None"}
    assert len(looks) == len(labels)
    legend = [text.get_text() for text in ax.get_legend().get_texts() if text.get_text().strip()]
    assert legend == ["standard", "bilinear BTT", *(label.partition(", ")[2] for label in labels)]
    assert [c.label for c in group(select(runs, ["d_model=64", "btt_tt_rank=1"]))] == ["standard", "bilinear BTT"]


def test_longer_runs_are_curves_of_their_own(tmp_path):
    write_lm(tmp_path / "a", max_iters=300)
    write_lm(tmp_path / "b", max_iters=600, seed=2)
    assert [c.variant for c in group(read_runs([tmp_path], "train.py"))] == ["steps = 300", "steps = 600"]


def test_tables_cover_the_code():
    assert set(STRUCTURES) == set(SCORING)
    assert all(len(set(column)) == len(STRUCTURES) for column in zip(*STRUCTURES.values(), strict=True))
    for settings in (*SCRIPTS.values(), train_TS.Settings):
        free = {f.name for f in dataclasses.fields(settings) if f.metadata["free"]}
        assert free <= IGNORED | {"max_iters", "patience"}
        used = {f.name for f in dataclasses.fields(settings)} & IGNORED
        assert used <= free | {"seed"}
    assert set(icl_compute.TASK) <= {f.name for f in dataclasses.fields(train_ICL.Settings)}


def test_plots_and_scripts_import_nothing_of_each_other():
    for folder, other in (("plots", "scripts"), ("scripts", "plots")):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(rf"^\s*(from|import) {other}\b", path.read_text(), re.MULTILINE), path


def test_a_cut_last_line_is_left_out_and_a_damaged_one_before_it_is_refused(tmp_path):
    path = write_icl(tmp_path / "a") / "metrics.jsonl"
    whole = load_run(tmp_path / "a").metrics
    path.write_text(path.read_text()[:-40])
    assert load_run(tmp_path / "a").metrics == whole[:-1]
    path.write_text("{" + path.read_text())
    with pytest.raises(BadInput, match=r"metrics.jsonl, line 1 is damaged"):
        load_run(tmp_path / "a")


def test_a_step_logged_twice_counts_once(tmp_path):
    folder = write_icl(tmp_path / "a", steps=(0, 100, 100, 300))
    (curve,) = learning_curves([load_run(folder)], "eval/last", "step")
    assert curve.steps == [100, 300]


def test_overlapping_paths_give_each_run_once(tmp_path):
    for seed in (1, 2):
        write_icl(tmp_path / "deep" / "er" / str(seed), seed=seed)
    assert len(read_runs([tmp_path, tmp_path / "deep", tmp_path / "deep" / "er" / "1"], "train_ICL.py")) == 2


def test_missing_runs_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    write_icl(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "fig.png"
    said = refusal(capsys, icl_compute.main, tmp_path / "a", tmp_path / "b", tmp_path / "empty", "--out", out)
    for name in ("b", "empty"):
        assert f"no run in {tmp_path / name}; make it with: python train_ICL.py" in said
        assert f"--out_dir={tmp_path / name}" in said
    assert not list(tmp_path.glob("fig*"))


def test_the_first_unfinished_run_is_named_with_the_command_that_goes_on(tmp_path, capsys):
    write_icl(tmp_path / "a")
    b = write_icl(tmp_path / "b", seed=2, status="stopped: SIGTERM", steps=(0, 100), init_from="auto")
    out = ("--out", tmp_path / "fig.png")
    said = refusal(capsys, icl_examples.main, tmp_path, *out)
    assert f"{b} is not finished (stopped: SIGTERM, step 100 of 300); take what there is with --unfinished" in said
    assert f"--out_dir={b} --init_from=auto" in said  # has no checkpoint yet
    (b / "ckpt.pt").touch()
    write_icl(tmp_path / "c", seed=3, status="running", steps=())
    said = refusal(capsys, icl_examples.main, tmp_path, *out)
    assert "(stopped: SIGTERM, step 100 of 300), nor are 1 more of 3 runs; take" in said
    assert "or go on with: python train_ICL.py --n_dims=4" in said
    assert f"--out_dir={b} --init_from=resume\n" in said
    assert "--init_from=auto --out_dir" not in said  # the flag it was started with is replaced
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("fig*"))


SWEEP = ["--run=True", "--together=True", "--only=^standard_n4", "--extra=--tf32=True --max_iters=300"]


def test_a_run_of_a_sweep_is_named_with_the_sweeps_command(tmp_path, capsys):
    """As in older records, whose runs had no command of their own."""
    how = "python scripts/icl_regression/sweep.py --run=True --together=True '--only=^standard_n4' "
    how += "'--extra=--tf32=True --max_iters=300'"
    for flags, said in (
        (dict(status="running", steps=(0, 100)), "(running, step 100 of 300); take what there is with --unfinished"),
        (dict(drop=["eval/last"]), "has no eval/last; remove it and make it again with: " + how + "\n"),
    ):
        folder = write_icl(tmp_path / said[:4], **flags)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | dict(argv=["train_ICL.py", *SWEEP])))
        message = refusal(capsys, icl_compute.main, folder, "--out", tmp_path / "fig.png")
        assert said in message
        assert message.endswith(how + "\n")


def test_unfinished_runs_count_as_far_as_they_got(tmp_path, capsys):
    write_icl(tmp_path / "a")
    write_icl(tmp_path / "b", steps=STEPS[:2], status="running", training_learning_rate=2e-3)
    icl_compute.main([str(tmp_path), "--unfinished", "--out", str(tmp_path / "fig.png")])
    assert (tmp_path / "fig.png").exists()
    steps = [row.split()[-5] for row in capsys.readouterr().out.splitlines() if "lr = " in row]
    assert sorted(steps) == ["100", "300"]


def test_rates_are_compared_at_the_last_step_that_all_have(tmp_path):
    write_icl(tmp_path / "long", scale=0.9)
    write_icl(tmp_path / "short", scale=0.5, steps=STEPS[:2], status="running", training_learning_rate=2e-3)
    (curve,) = tuned(read_runs([tmp_path], "train_ICL.py", unfinished=True))
    assert [run.folder.name for run in curve.runs] == ["short"]  # though the other ends lower
    assert curve.runs[0].final("eval/last") > load_run(tmp_path / "long").final("eval/last")


def test_missing_metrics_are_named(tmp_path, capsys):
    out = tmp_path / "fig.png"
    a, b = write_icl(tmp_path / "a", drop=["eval/last"]), write_icl(tmp_path / "b", drop=["paper_compute"])
    said = refusal(capsys, icl_compute.main, a, "--out", out)
    assert f"{a} has no eval/last; make it again with: python train_ICL.py" in said
    assert "--overwrite=True" in said
    assert f"{b} has no paper_compute" in refusal(capsys, icl_compute.main, b, "--x", "paper_compute", "--out", out)
    c = write_icl(tmp_path / "c", scale=float("nan"))
    for main in (icl_compute.main, icl_examples.main, icl_width.main):
        assert f"{c}: eval/last or " in refusal(capsys, main, c, "--out", out)
    assert not list(tmp_path.glob("fig*"))


def test_settings_that_are_missing_and_numbers_that_are_words_are_named(tmp_path, capsys):
    out, a, b = ("--out", tmp_path / "fig.png"), write_icl(tmp_path / "a"), write_lm(tmp_path / "b")
    record = json.loads((a / "run.json").read_text())
    del record["settings"]["d_model"]
    (a / "run.json").write_text(json.dumps(record))
    text = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text(text.replace('"val/loss": ', '"val/loss": "x", "y": '))
    assert refusal(capsys, icl_compute.main, a, *out) == f"error: {a}/run.json has no setting d_model\n"
    said = f"error: {b}: val/loss or step is no finite number at step 0\n"
    assert refusal(capsys, lm_compute.main, b, "--x=step", *out) == said


def test_what_cannot_share_a_picture_is_refused(tmp_path, capsys):
    a, b = write_icl(tmp_path / "a"), write_icl(tmp_path / "b", noise_std=0.5)
    lm, out = write_lm(tmp_path / "lm"), tmp_path / "fig.png"
    for main in (icl_compute.main, icl_examples.main, icl_width.main):
        said = refusal(capsys, main, a, b, "--out", out)
        assert "differ in noise_std (0.0 or 0.5); choose with --only noise_std=0.0" in said
    assert f"{lm} is a run of train.py" in refusal(capsys, icl_compute.main, a, lm, "--out", out)
    other = dict(command="train_TS.py", argv=["train_TS.py"], settings={}, status="finished")
    (tmp_path / "ts").mkdir()
    (tmp_path / "ts" / "run.json").write_text(json.dumps(other))
    assert "ts is a run of train_TS.py" in refusal(capsys, icl_compute.main, a, tmp_path / "ts", "--out", out)
    new = write_icl(tmp_path / "new", token_mixing_struct="dense")
    assert "no name for token_mixing_struct 'dense'" in refusal(capsys, icl_compute.main, a, new, "--out", out)
    shutil.copytree(a, tmp_path / "copy")
    assert "are the same run, seed 1" in refusal(capsys, icl_compute.main, a, tmp_path / "copy", "--out", out)
    assert "did you mean 'n_dims'?" in refusal(capsys, icl_compute.main, a, "--only", "n_dim=4", "--out", out)
    said = refusal(capsys, icl_compute.main, a, "--only", "n_dims=9", "--out", out)
    assert "no run has n_dims = 9; there is 4" in said
    assert "NAME=VALUE" in refusal(capsys, icl_compute.main, a, "--only", "n_dims", "--out", out)
    assert "ends in .png" in refusal(capsys, icl_compute.main, a, "--out", tmp_path / "fig.pdf")
    assert not list(tmp_path.glob("fig*"))


def test_only_chooses_and_says_how_many_it_left_out(tmp_path, capsys):
    for width in (64, 128, 256):
        write_icl(tmp_path / str(width), d_model=width)
    runs = read_runs([tmp_path], "train_ICL.py", ["d_model=64", "d_model=256", "training_learning_rate=1e-3"])
    assert [run.settings["d_model"] for run in runs] == [256, 64]  # by folder
    assert "1 of 3 runs left out by --only" in capsys.readouterr().err
    ranks = write_icl(tmp_path / "ranks", d_model=64, seed=2, mlr_rank_list="8|4")
    assert [run.folder for run in read_runs([tmp_path], "train_ICL.py", ["mlr_rank_list=8|4", "seed=2"])] == [ranks]


def coverage(noise, draws):
    """How often the intervals of the exponents and of the share cover what runs with log-normal noise were made with.

    Two structures at four widths, two seeds, of which the second's windows are harder; the larger width has one seed.
    """
    rng, covered = np.random.default_rng(1), []
    for _ in range(draws):
        rows = []
        for structure, b, a in (("low_rank", 0.045, 1.0), ("multi_level_low_rank", 0.035, 0.7)):
            for width, seed in itertools.product((256, 384, 512, 768), (1, 2)):
                if (width, seed) != (768, 1):
                    x = 1e9 * width**2
                    loss = a * x**-b * np.exp(0.02 * (seed == 2) + noise * rng.standard_normal())
                    rows.append((structure, seed, width, x, loss))
        laws = lm_laws.fit_points(
            pd.DataFrame(rows, columns=["structure", "seed", "d_model", "x", "value"]), by_seed=True
        )
        _, low, high = laws.exponent("low_rank")
        _, least, most = laws.share("multi_level_low_rank", loss=0.4)
        harder = np.exp(0.01)  # the mean seed's windows than those of seed 1
        true = (0.4 / (0.7 * harder)) ** (-1 / 0.035) / (0.4 / harder) ** (-1 / 0.045)
        covered.append((low <= 0.045 <= high, least <= true <= most))
    return np.mean(covered, 0), laws


def test_the_intervals_of_exponents_and_shares_cover_what_the_runs_were_made_with(monkeypatch):
    monkeypatch.setattr(lm_laws, "RESAMPLED", 300)
    (exponents, shares), laws = coverage(noise=0.004, draws=150)
    assert exponents == pytest.approx(0.95, abs=0.055)  # three standard errors
    assert shares == pytest.approx(0.93, abs=0.07)
    assert laws.offset(2) - laws.offset(1) == pytest.approx(0.02, abs=0.01)


TWO = {"s": ("low_rank", 0.05, 5e4), "m": ("multi_level_low_rank", 0.07, 4e4)}  # structure, exponent, pace


def write_widths(folder, widths=(256, 384, 512)):
    """Standard and MLR attention with seeds 1 and 2 at rate 3e-3 on their laws, and worse at 1e-2."""
    for width, (name, (structure, exponent, pace)) in itertools.product(widths, TWO.items()):
        flags = dict(exponent=exponent, token_mixing_struct=structure, pace=pace * 256 / width)
        for seed in (1, 2):
            write_lm(folder / f"{name}{width}_{seed}", width, seed=seed, scale=0.99 + seed / 50, **flags)
        write_lm(folder / f"{name}{width}_fast", width, scale=1.3, init_lr=1e-2, **flags)
    return read_runs([folder], "train.py")


def test_lm_fit_goes_through_the_last_point_of_every_run_of_the_best_rate(tmp_path):
    chosen = lm_laws.best_runs(write_widths(tmp_path))
    assert {run.settings["init_lr"] for run in chosen} == {3e-3}
    laws = lm_compute.draw_laws(ax := axes(), chosen, "non_emb_compute")
    assert laws.structures == ["low_rank", "multi_level_low_rank"]
    for structure, exponent in (("low_rank", 0.05), ("multi_level_low_rank", 0.07)):
        b, low, high = laws.exponent(structure)
        np.testing.assert_allclose([b, low, high], exponent, rtol=1e-6)
        mine = [run for run in chosen if run.structure == structure]
        x = np.array([run.final("non_emb_compute") for run in mine], float)
        middle = np.sqrt(1.01 * 1.03)  # the two seeds' windows are 0.99 + seed / 50 times as hard
        np.testing.assert_allclose(laws.loss(structure, x)[0], middle * 20 * x**-exponent)
        own = {len(line.get_xdata()): line for line in ax.lines if line.get_color() == COLOURS[structure]}
        np.testing.assert_allclose(own[50].get_ydata(), middle * 20 * own[50].get_xdata() ** -exponent)
        np.testing.assert_allclose(own[6].get_ydata(), middle * 20 * own[6].get_xdata() ** -exponent)  # moved points
    assert np.exp(laws.offset(2) - laws.offset(1)) == pytest.approx(1.03 / 1.01)
    assert {"D = 256", "384", "512"} == {t.get_text() for t in ax.texts}


def test_lm_panels_have_their_own_laws_and_a_panel_for_each_width(tmp_path, capsys, monkeypatch):
    write_widths(tmp_path)
    drawn_panels = []
    monkeypatch.setattr(style, "legend_below", lambda axes, shown, ncols: drawn_panels.append((axes, shown)))
    lm_compute.main([str(tmp_path), "--fit", "--x=non_emb_compute", "--x=gpu_seconds",
                     "--out", str(tmp_path / "two.png")])  # fmt: skip
    ((panels, shown),) = drawn_panels
    assert [ax.get_title() for ax in panels] == ["", "", "D = 256", "D = 384", "D = 512"]
    assert [key.get_label() for key in shown] == [
        "standard: $C^{-0.050 \\pm 0.000}$, $t^{-0.100 \\pm 0.000}$",  # FLOPs are the square of the width, seconds not
        "MLR: $C^{-0.070 \\pm 0.000}$, $t^{-0.140 \\pm 0.000}$",
        "seed 1", "seed 2",
    ]  # fmt: skip
    assert [len(ax.lines) for ax in panels[2:]] == [4] * 3  # every run at its best rate


def test_what_a_law_needs_of_standard_attentions_compute(tmp_path, capsys):
    """Losses 20 C^-0.05 and 0.97 of it: as low with 0.97^20 of the compute, between the losses that both reached."""
    for width in (256, 384, 512):
        flags = dict(pace=5e4 * 256 / width)  # FLOPs are the square of the width, seconds not
        write_lm(tmp_path / f"s{width}", width, **flags)
        write_lm(tmp_path / f"m{width}", width, scale=0.97, token_mixing_struct="multi_level_low_rank", **flags)
    lm_laws.main([str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "| standard | 3 | 0.050 [0.050, 0.050] | 0.100 [0.100, 0.100] |"
    worst, best = (20 * spent(STEPS[-1], width)["non_emb_compute"] ** -0.05 for width in (256, 512))
    ends = f"{np.floor(97 * worst) / 100:.2f}", f"{np.ceil(100 * best) / 100:.2f}"
    shares = [f"{share:.2f} [{share:.2f}, {share:.2f}]" for share in (0.97**20, 0.97**10)]
    rows = [line for line in said if line.endswith(f"| {' | '.join(shares)} |")]
    assert [row.split()[1] for row in rows] == [*ends]
    assert "do not meet beyond the largest run" in " ".join(said)


def test_laws_that_meet(tmp_path):
    """20 C^-0.05 and a C^-0.03 meet where 20 / a = C^0.02."""
    for width in (256, 384, 512):
        write_lm(tmp_path / f"s{width}", width)
        scale = 0.95 * (1e9 * 300 * 512**2) ** -0.02
        write_lm(tmp_path / f"m{width}", width, scale, exponent=0.03, token_mixing_struct="multi_level_low_rank")
    laws = lm_laws.fit_laws(read_runs([tmp_path], "train.py"))
    words = lm_laws.crossing_words(laws)
    assert words.endswith(f"meet at {0.95**-50:.1f} times the FLOPs of the largest run.")


def test_only_runs_on_the_same_text_are_pairs(tmp_path, capsys):
    """Seeds draw windows of their own; the whole text is another than all of them."""
    for seed, lead in ((1, 0.10), (2, 0.06), (3, 0.08)):
        for name, scale in (("low_rank", 1.0), ("multi_level_low_rank", 1 - lead)):
            write_lm(tmp_path / f"{name}{seed}", scale=scale, seed=seed, token_mixing_struct=name)
    mlr = dict(token_mixing_struct="multi_level_low_rank")
    write_lm(tmp_path / "w1", scale=0.5, seed=1, max_iters=900, val_tokens=9, **mlr)
    write_lm(tmp_path / "w2", scale=2.0, seed=4, eval_iters=3, **mlr)
    runs = read_runs([tmp_path], "train.py", unfinished=True)
    assert sorted({run.settings["validation"] for run in runs}) == ["random windows", "whole text"]
    (table,) = lm_pairs.pairs(runs).values()
    loss = 20 * (300e9 * 256**2) ** -0.05
    np.testing.assert_allclose(table.lead, loss * np.array([0.10, 0.06, 0.08]))
    mean, low, high, _ = student(table.lead)
    assert mean == pytest.approx(0.08 * loss)
    half = 4.303 * 0.02 * loss / np.sqrt(3)  # Student's t with two degrees of freedom
    np.testing.assert_allclose([low, high], [mean - half, mean + half], rtol=1e-3)
    assert student(table.lead[:2]) == (pytest.approx(0.08 * loss), None, None, None)
    assert lm_pairs.trend(table) is None  # one width
    with pytest.raises(BadInput, match="differ in validation"):
        lm_laws.fit_laws(runs)
    lm_pairs.main([str(tmp_path), "--only", "validation=random windows"])
    assert "| MLR | 3 of 3 pairs | +" in capsys.readouterr().out
    write_lm(tmp_path / "again", seed=1)
    said = refusal(capsys, lm_pairs.main, tmp_path)
    assert "have the same settings; give one" in said


def test_pairs_at_the_best_rates(tmp_path, capsys):
    """MLR is best at 1e-3, standard attention at 3e-3; at equal rates standard attention is ahead."""
    for seed in (1, 2, 3):
        for name, at_3, at_1 in (("low_rank", 1.0, 1.01), ("multi_level_low_rank", 1.02, 0.98)):
            for rate, scale in ((3e-3, at_3), (1e-3, at_1)):
                flags = dict(seed=seed, init_lr=rate, token_mixing_struct=name)
                write_lm(tmp_path / f"{name}{rate}{seed}", scale=scale, val_tokens=9, **flags)
    lm_pairs.main([str(tmp_path), "--best"])
    assert f"| MLR | 3 of 3 pairs | {0.02 * 20 * (300e9 * 256**2) ** -0.05:+.4f} [" in capsys.readouterr().out
    lm_pairs.main([str(tmp_path), "--only", "init_lr=0.003"])
    assert "| MLR | 0 of 3 pairs | -" in capsys.readouterr().out


def test_the_trend_of_the_lead_is_a_regression_on_the_logarithm_of_the_width(tmp_path):
    for width in (256, 512, 1024):
        for name, less in (("low_rank", 0), ("multi_level_low_rank", 0.2 - 0.01 * np.log2(width))):
            loss = 20 * spent(STEPS[-1], width)["non_emb_compute"] ** -0.05
            write_lm(tmp_path / f"{name}{width}", width, scale=1 - less / loss, token_mixing_struct=name)
    (table,) = lm_pairs.pairs(read_runs([tmp_path], "train.py")).values()
    slope, low, high = lm_pairs.trend(table)
    np.testing.assert_allclose([slope, low, high], -0.01 / np.log(2), rtol=1e-6)


def test_lm_rates_has_every_run_of_a_rate_and_the_lead_at_the_best(tmp_path, capsys):
    mlr = dict(token_mixing_struct="multi_level_low_rank")
    for name, flags in dict(
        a=dict(scale=1.10, init_lr=1e-3), b=dict(scale=1.0, init_lr=3e-3), b2=dict(scale=1.04, init_lr=3e-3),
        c=dict(scale=0.98, init_lr=1e-3, **mlr), d=dict(scale=0.96, init_lr=3e-3, **mlr),
    ).items():  # fmt: skip
        write_lm(tmp_path / name, **flags)
    lm_rates.main([str(tmp_path)])
    said = capsys.readouterr().out
    one = 20 * (300e9 * 256**2) ** -0.05
    assert f"| 256 | standard | {1.1 * one:.4f} | **{one:.4f}, {1.04 * one:.4f}** |" in said
    assert f"| 256 | MLR | {0.98 * one:.4f} | **{0.96 * one:.4f}** |" in said
    words = " ".join(said.split())
    lead = f"{(1.02 - 0.96) * one:.3f} nats at d_model 256"
    assert f"its best rate (one seed) MLR attention leads standard attention by {lead}." in words
    assert f"Runs of one command are up to {0.04 * one:.3f} nats apart." in words


def test_lm_curves_say_when_standard_attentions_last_loss_is_reached(tmp_path, capsys):
    write_lm(tmp_path / "s")
    write_lm(tmp_path / "m", scale=0.975, token_mixing_struct="multi_level_low_rank")
    write_lm(tmp_path / "w", scale=1.1, token_mixing_struct="low_rank_with_sliding_window")
    lm_curves.main([str(tmp_path)])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[-1] for row in rows] == [" |", "not by 300 |", "200 |"]  # 0.975 of it after 2/3 of the steps: 2/3^-0.05
    lm_curves.main([str(tmp_path), "--out", str(tmp_path / "fig.png")])
    assert (tmp_path / "fig.png").exists()


def test_times_are_of_one_card(tmp_path, capsys, monkeypatch):
    """The card of most runs, under the axis; compute is of all of them."""
    folders = [write_lm(tmp_path / f"{seed}", seed=seed, pace=2e4 * seed) for seed in (1, 2, 3)]
    for folder, card in zip(folders, ("H100", "H200", "H200"), strict=True):
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | dict(device=card)))
    runs = read_runs([tmp_path], "train.py")
    (curve,) = lm_compute.draw(ax := axes(), runs, "gpu_seconds")
    assert curve.seeds == [2, 3]
    assert ax.get_xlabel().endswith("pace (s), H200")
    (curve,) = lm_compute.draw(ax := axes(), runs)
    assert curve.seeds == [1, 2, 3]
    assert "H200" not in ax.get_xlabel()
    other = write_lm(tmp_path / "mlr", token_mixing_struct="multi_level_low_rank")  # on neither card
    named = []
    monkeypatch.setattr(style, "shared_legend", lambda axes, curves: named.extend(c.structure for c in curves))
    lm_compute.main([str(tmp_path), "--x=step", "--x=gpu_seconds", "--out", str(tmp_path / "fig.png")])
    assert sorted(named) == ["low_rank", "multi_level_low_rank"]
    assert "gpu_seconds: 2 of 4 runs left out, which ran on another card" in capsys.readouterr().out
    shutil.rmtree(other)
    lm_compute.main([str(tmp_path), "--x=step", "--x=gpu_seconds", "--out", str(tmp_path / "fig.png")])
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert said == ["gpu_seconds: 1 of 3 runs left out, which ran on another card"]


def test_gpu_seconds_are_tokens_at_the_median_pace_without_the_first_progress_line(tmp_path, capsys):
    run = load_run(write_lm(tmp_path / "a", pace=5e4))
    assert run.pace == 2 * 5e4
    (curve,) = lm_compute.draw(axes(), [run], "gpu_seconds")
    np.testing.assert_allclose(curve.x, [1000 * step / 1e5 for step in STEPS[1:]])
    short = write_lm(tmp_path / "b", steps=STEPS[:3])
    said = refusal(capsys, lm_compute.main, short, "--x=gpu_seconds", "--out", tmp_path / "fig.png")
    assert f"{short} has 2 progress lines with tokens_per_s after its first, a pace needs 3; choose another --x" in said
    assert not list(tmp_path.glob("fig*"))


def test_lm_axes_begin_where_the_losses_come_near_their_ends(tmp_path):
    write_lm(tmp_path / "a", 256, exponent=0.4)
    write_lm(tmp_path / "b", 512, exponent=0.39)
    curves = lm_compute.draw(ax := axes(), read_runs([tmp_path], "train.py"))
    top = lm_compute.HEADROOM * max(curve.mean[-1] for curve in curves)
    assert ax.get_ylim()[1] == pytest.approx(top)
    assert ax.get_ylim()[0] < min(curve.mean[-1] for curve in curves)
    narrow = curves[0]
    crossing = (20 / top) ** (1 / 0.4)  # of a straight line
    assert narrow.x[0] < crossing < narrow.x[-1]
    left, right = ax.get_xlim()
    np.testing.assert_allclose(left, crossing / (curves[1].x[-1] / crossing) ** lm_compute.MARGIN)
    assert right > curves[1].x[-1]
    one = load_run(write_lm(tmp_path / "one", steps=STEPS[:2]))
    (curve,) = lm_compute.draw(ax := axes(), [one])
    left, right = ax.get_xlim()
    assert 1.05 * left < curve.x[0] < right / 1.05  # a single point, too, has room


def test_lm_figures_and_table_take_unfinished_runs(tmp_path, capsys):
    write_lm(tmp_path / "a")
    write_lm(tmp_path / "b", steps=STEPS[:3], status="running", seed=2)
    flags = ("--out", str(tmp_path / "fig.png"))
    for main, more in ((lm_compute.main, flags), (lm_levels.main, flags), (lm_table.main, ())):
        assert "b is not finished (running, step 200 of 300)" in refusal(capsys, main, tmp_path, *more)
        main([str(tmp_path), "--unfinished", *more])
        assert "| 200 |" in (said := capsys.readouterr().out) or " 200 " in said


LEVELS = (None, "48|16", "32|16|16")  # ranks


def write_levels(folder):
    """Standard attention and MLR attention of 2 and 3 levels, two seeds each, and a worse rate of the last."""
    for i, ranks in enumerate(LEVELS):
        flags = dict(mlr_rank_list=ranks, token_mixing_struct="multi_level_low_rank") if ranks else {}
        for seed in (1, 2):
            write_lm(folder / f"{i}_{seed}", seed=seed, scale=1 - 0.1 * i + seed / 50, **flags)
    write_lm(folder / "rate", scale=2.0, init_lr=1e-2, **flags)
    return read_runs([folder], "train.py")


def test_lm_levels_draws_the_last_loss_over_the_number_of_levels(tmp_path, capsys):
    runs = write_levels(tmp_path)
    curves = lm_levels.draw(ax := axes(), runs)
    assert [curve.label for curve in curves] == ["standard", *(f"MLR, mlr_rank_list = {r}" for r in LEVELS[1:])]
    for i, box in enumerate(ax.containers):
        losses = [20 * (1 - 0.1 * i + seed / 50) * (300e9 * 256**2) ** -0.05 for seed in (1, 2)]
        line, _, (bars,) = box
        np.testing.assert_allclose(line.get_data(), [[i + 1], [np.mean(losses)]])
        np.testing.assert_allclose(bars.get_segments()[0][:, 1], [min(losses), max(losses)])
        assert line.get_color() == COLOURS[curves[i].structure]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "3"]
    lm_levels.main([str(tmp_path), "--out", str(tmp_path / "levels.png")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("standard", "MLR"))]
    assert [row[-5] for row in rows] == ["300"] * 3
    assert [row[-4] for row in rows] == ["1", "2", "3"]
    assert rows[-1][4:10] == ["2", "1", "2", "0.003", "0.003", "0.01"]
    assert (tmp_path / "levels.png").exists()


def test_lm_levels_refuses_what_differs_in_more_than_its_levels(tmp_path, capsys):
    write_levels(tmp_path / "runs")
    mlr = dict(token_mixing_struct="multi_level_low_rank", mlr_rank_list="32|16|8|8")
    for name, flags, said in (
        ("width", mlr | dict(width=512), "differ in d_model (256 or 512); choose with --only d_model=256"),
        ("T", mlr | dict(block_size=512), "differ in block_size (1024 or 512)"),
        ("steps", mlr | dict(max_iters=600), "differ in max_iters (300 or 600)"),
        ("data", mlr | dict(dataset="pydocs"), "differ in dataset"),
        ("weights", mlr | dict(mlr_block_divide_by_num_levels=True), "differ in mlr_block_divide_by_num_levels"),
        ("batch", mlr | dict(batch_size=8), "differ in batch_size (4 or 8)"),
        ("again", mlr | dict(mlr_rank_list="16|32|16"), "both have 3 levels; choose with --only"),
        ("window", dict(token_mixing_struct="low_rank_with_sliding_window"), "sliding window, which has no levels"),
    ):
        more = write_lm(tmp_path / name, **flags)
        assert said in refusal(capsys, lm_levels.main, tmp_path / "runs", more, "--out", tmp_path / "fig.png")
    assert not list(tmp_path.glob("fig*"))


def test_lm_table(tmp_path, capsys):
    write_levels(tmp_path)
    lm_table.main([str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    losses = [20 * (0.8 + seed / 50) * (300e9 * 256**2) ** -0.05 for seed in (1, 2)]
    row = f"{np.mean(losses):.4f} ({losses[0]:.4f} {losses[1]:.4f}) | 100,000 | {300e9 * 256**2:.3g} |"
    assert said[4] == f"| MLR | 32\\|16\\|16 | 256 | 1024 | 300 | 0.003 (0.003 0.01) | 1 2 | {row}"
    assert said[2].startswith("| standard |  | 256 | 1024 | 300 | 0.003 (0.003) | 1 2 | ")
    assert said[6:] == [
        "7 runs, 0.1 hours of training.",
        "One learning rate only, so none was chosen: standard at D 256; MLR 48|16 at D 256.",
    ]
    lm_table.main([str(tmp_path), "--all-rates"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[5:7] for line in said[3:6]] == [["0.003", "1 2"], ["0.003", "1 2"], ["0.01", "1"]]
    short = write_lm(tmp_path / "short", steps=STEPS[:2], width=512)
    lm_table.main([str(short)])
    assert capsys.readouterr().out.splitlines()[2].endswith("|  | 2.62e+16 |")  # too few lines for a pace


def test_a_fit_needs_three_widths_once_each_and_different_x(tmp_path, capsys):
    for width in (256, 384):
        write_lm(tmp_path / str(width), width)
    out = tmp_path / "fig.png"
    said = refusal(capsys, lm_compute.main, tmp_path, "--fit", "--out", out)
    assert "needs 3 widths, standard has 2; make more with --d_model" in said
    write_lm(tmp_path / "512", 512)
    assert "end at the same x" in refusal(capsys, lm_compute.main, tmp_path, "--fit", "--x", "step", "--out", out)
    write_lm(tmp_path / "512b", 512, weight_decay=0.1)
    assert "2 curves of width 512" in refusal(capsys, lm_compute.main, tmp_path, "--fit", "--out", out)
    assert not list(tmp_path.glob("fig*"))


def test_a_structure_of_two_widths_has_no_law(tmp_path):
    for width in (256, 384, 512):
        write_lm(tmp_path / f"s{width}", width)
    for width in (256, 512):
        write_lm(tmp_path / f"m{width}", width, scale=0.9, token_mixing_struct="multi_level_low_rank")
    assert lm_laws.fit_laws(read_runs([tmp_path], "train.py")).structures == ["low_rank"]


def test_tick_text():
    assert [tick_text(v) for v in (0, 0.05, 1, 1.25, 1000, 1e4, 2e17, 1e-4)] == [
        "", "0.05", "1", "1.25", "1000", "$10^{4}$", "$2\\times10^{17}$", "$10^{-4}$"
    ]  # fmt: skip


def write_grid(folder, sizes=((4, 16), (4, 32), (8, 64))):
    """Standard attention with 8 heads and with 1, and bilinear BTT, at two learning rates, the second for one seed."""
    kinds = dict(s8=("low_rank", 8, 2.0), s1=("low_rank", 1, 1.5), b8=("bilinear_BTT", 8, 1.0))
    for (n_dims, d_model), (name, (structure, n_head, scale)) in itertools.product(sizes, kinds.items()):
        flags = dict(n_dims=n_dims, n_positions=2 * n_dims, d_model=d_model, n_head=n_head)
        for rate, seed in ((1e-3, 1), (1e-3, 2), (3e-3, 1)):
            where = folder / f"{name}_n{n_dims}_d{d_model}_{rate}_{seed}"
            best = (rate == 1e-3) == (name != "s1")
            flags |= dict(training_learning_rate=rate, seed=seed, token_mixing_struct=structure)
            write_icl(where, scale=scale * (1 if best else 1.25) * (16 / d_model) * (1 + seed / 10), **flags)
    return read_runs([folder], "train_ICL.py")


def test_the_best_learning_rate_is_chosen_on_the_seeds_that_all_have(tmp_path):
    for rate, seed, scale in ((1e-3, 1, 1.0), (1e-3, 2, 9.0), (3e-3, 1, 2.0)):
        write_icl(tmp_path / f"{rate}{seed}", training_learning_rate=rate, seed=seed, scale=scale)
    write_icl(tmp_path / "wide", training_learning_rate=3e-3, d_model=256)
    narrow, wide = tuned(read_runs([tmp_path], "train_ICL.py"))
    assert (narrow.settings["training_learning_rate"], narrow.seeds) == (1e-3, [1, 2])  # though seed 2 is worse
    assert narrow.tried == pytest.approx({1e-3: 0.5**7, 3e-3: 2 * 0.5**7})
    assert list(wide.tried) == [3e-3]
    assert [c.label for c in (narrow, wide)] == ["standard, D = 128", "standard, D = 256"]  # the rate is not named
    write_icl(tmp_path / "other", training_learning_rate=1e-2, seed=7)
    with pytest.raises(BadInput, match=r"no seed is in all of training_learning_rate = 0.001 or 0.003 or 0.01"):
        tuned(read_runs([tmp_path], "train_ICL.py"))


def test_icl_width_draws_the_final_error_over_the_width_of_a_head(tmp_path):
    curves = tuned(write_grid(tmp_path), unnamed=ICL_SIZES)
    assert list(line_styles(curves).items()) == [("8 heads", "-"), ("1 head", "--"), ("", "-")]
    mine = by_setting(curves, "n_dims")[4]
    icl_width.draw(ax := axes(), mine, line_styles(curves))
    lines = {box.get_label(): box for box in ax.containers}
    assert list(lines) == ["standard, 8 heads", "standard, 1 head", "bilinear BTT"]
    for label, widths, scale, seeds in (
        ("standard, 8 heads", [2, 4], 2.0, (1, 2)),
        ("standard, 1 head", [16, 32], 1.5, (1,)),
        ("bilinear BTT", [2, 4], 1.0, (1, 2)),
    ):
        line, _, (bars,) = lines[label]
        errors = [[scale * (1 + seed / 10) * half * 0.5**7 for seed in seeds] for half in (1, 0.5)]
        np.testing.assert_allclose(line.get_data(), [widths, np.mean(errors, 1)])
        ends = [segment[:, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [[min(e), max(e)] for e in errors])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "4", "16", "32"]
    bottleneck = [line for line in ax.lines if list(line.get_xdata()) == [4, 4]]
    assert len(bottleneck) == 1
    assert {"r = n_dims", "zero"} <= {t.get_text() for t in ax.texts}
    more = write_icl(tmp_path / "more", token_mixing_struct="bilinear_BTT", d_model=16, n_head=8, max_iters=900)
    again = tuned([*(run for curve in mine for run in curve.runs), load_run(more)], unnamed=ICL_SIZES | {"max_iters"})
    with pytest.raises(BadInput, match="two points of one kind and head width"):
        icl_width.draw(axes(), again, line_styles(again))


def test_one_head_and_eight_are_two_lines_where_no_width_has_both(tmp_path):
    for n_head, widths in {1: (16, 32), 8: (128, 256)}.items():  # heads of 16 and 32 features, all four
        for d_model in widths:
            write_icl(tmp_path / f"{n_head}_{d_model}", n_head=n_head, d_model=d_model)
    curves = tuned(read_runs([tmp_path], "train_ICL.py"), unnamed=ICL_SIZES)
    icl_width.draw(ax := axes(), curves, line_styles(curves))
    assert [box.get_label() for box in ax.containers] == ["standard, 8 heads", "standard, 1 head"]
    for box in ax.containers:
        np.testing.assert_array_equal(box[0].get_xdata(), [16, 32])


def test_icl_compute_draws_every_run_and_the_envelope_of_its_means(tmp_path):
    runs = [run for run in write_grid(tmp_path) if run.settings["n_dims"] == 4]
    curves = learning_curves(runs, "eval/last", "compute", unnamed=ICL_SIZES | {"training_learning_rate"})
    icl_compute.draw(ax := axes(), curves, "compute", line_styles(curves))
    assert list(drawn(ax)) == ["standard, 8 heads", "standard, 1 head", "bilinear BTT"]
    assert len(ax.lines) == len(runs) + 3 + len(icl_examples.LEVELS)
    for alike in by_kind(curves):
        x, y = drawn(ax)[alike[0].label]
        assert (np.diff(x) > 0).all()
        assert (np.diff(y) < 0).all()
        points = {(a, b) for c in alike for a, b in zip(c.x, c.mean, strict=True)}
        assert set(zip(x, y, strict=True)) <= points
        for spent_, error in points:  # nothing is below it
            assert error >= y[x <= spent_][-1]


def test_envelope():
    """Falling where a curve goes below all that were reached with less, wherever it is given."""
    a, b = (Curve([], "") for _ in range(2))
    a.set([1, 4, 8], [[9, 3, 2.5]])
    b.set([2, 6, 9], [[10, 1, 5]])
    np.testing.assert_array_equal(envelope([b, a]), [[1, 4, 6], [9, 3, 1]])


def test_icl_examples_has_a_panel_for_each_size(tmp_path, capsys):
    write_grid(tmp_path / "runs")
    icl_examples.main([str(tmp_path / "runs"), "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    sizes = [line for line in said.splitlines() if line.startswith("n_dims")]
    assert sizes == [f"n_dims = {n}, D = {d}" for n, d in ((4, 16), (4, 32), (8, 64))]
    rows = [line.split() for line in said.splitlines() if line.startswith("standard, 1 head")]
    assert {tuple(row[5:8]) for row in rows} == {("0.003", "0.001", "0.003")}  # the rate, and those it was chosen from
    icl_examples.main([str(tmp_path / "runs"), "--only", "d_model=16", "--out", str(tmp_path / "b.png")])
    assert "D = 32" not in capsys.readouterr().out


def test_icl_table_by_steps_has_the_median_and_every_seed(tmp_path, capsys):
    write_grid(tmp_path)
    icl_table.main([str(tmp_path), "--only", "n_dims=4", "--steps=200|300"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "| n_dims | D | attention | rate | seeds | 200 steps | 300 steps |"
    errors = [2.0 * (1 + seed / 10) * 0.5 ** (7 * step / 300) for step in (200, 300) for seed in (1, 2)]
    cells = [f"{(x + y) / 2:.3g} ({x:.2g}, {y:.2g})" for x, y in (errors[:2], errors[2:])]
    assert f"| 4 | 16 | standard, 8 heads | 0.001 | 2 | {' | '.join(cells)} |" in said
    assert f"| 4 | 16 | standard, 8 heads | 0.003 | 1 | {1.25 * errors[0]:.3g} | {1.25 * errors[2]:.3g} |" in said
    assert len([line for line in said if line.startswith("| 4 | ")]) == 12
    words = " ".join(said)
    assert "18 runs, 0.2 hours of training." in words
    assert "Simple methods have errors of, at n_dims 4: least squares 1e-14, ridge 0.12, averaging 0.57" in words


def test_icl_table_counts_a_run_that_never_gets_there(tmp_path, capsys):
    """Errors scale * 0.5^(7 step / 300): at 0.25 by step 100 where scale is 1, by 200 where it is 5, never where 90."""
    for name, scales in dict(low_rank=(1, 1, 90), bilinear_MLR=(90, 90, 1), bilinear_BTT=(1, 5, 90)).items():
        for seed, scale in enumerate(scales, 1):
            flags = dict(seed=seed, token_mixing_struct=name)
            write_icl(tmp_path / f"{name}{seed}", scale=scale, **flags)
            write_icl(tmp_path / f"{name}{seed}_bad", scale=99, training_learning_rate=3e-3, **flags)
    icl_table.main([str(tmp_path), "--errors=0.25"])
    said = capsys.readouterr().out.splitlines()
    flops = {step: f"{step * 1e9 * 128**2:.2g}" for step in (100, 200, 300)}
    assert [line.partition(" | 0.001 | 3 | ")[2] for line in said[2:5]] == [
        f"100 (1 of 3 not) | {flops[100]} (1 of 3 not) |",
        f"not by 300 (2 of 3 not) | not by {flops[300]} (2 of 3 not) |",
        f"200 (1 of 3 not) | {flops[200]} (1 of 3 not) |",
    ]


def test_icl_table_ledger(tmp_path, capsys):
    write_grid(tmp_path)
    run = tmp_path / "s1_n8_d64_0.003_1"
    record = json.loads((run / "run.json").read_text())
    record |= dict(commit="0123456789", device="GPU", versions=dict(torch="2.13.0"))
    (run / "run.json").write_text(json.dumps(record))
    icl_table.main([str(run), "--ledger"])
    header, _, row, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("| run | commit | device | torch | steps | minutes |")
    assert row.startswith("| `s1_n8_d64_0.003_1` | 0123456 | GPU | 2.13.0 | 300 | 0.5 | 0.003 | 1 |")


def write_bench(path, lengths=(512, 1000), device="GPU", **changes):
    """What `bench.py attention --out` writes: curve c takes c + 2 times as long as the default, which is no curve.

    changes: keys of the row of fused MLR at the first length.
    """
    rows = [
        dict(structure=structure, backend=backend, T=T, forward_ms=T * c, both_ms=3 * T * c, extra_MiB=c)
        for T in lengths
        for c, (structure, backend) in enumerate([speed_table.DEFAULT, *attention_speed.CURVES, ("GSWA", "auto")], 1)
    ]
    mlr = next(row for row in rows if row["backend"] == "triton")
    mlr |= changes
    settings = dict(n_head=12, tokens=65536, lengths="|".join(map(str, lengths)))
    about = dict(command="attention", device=device, torch="2.13.0", dtype="bfloat16")
    path.write_text(json.dumps(dict(about, settings=settings, rows=rows)))
    return path


def test_attention_speed_draws_times_relative_to_the_default(tmp_path):
    path = write_bench(tmp_path / "a.json", (2048, 512, 1000))
    panels = Figure().subplots(1, 2)
    attention_speed.draw(panels, speed_table.by_length(speed_table.read(path)))
    for ax in panels:
        lines = {label: line for label, line in drawn(ax).items() if " " in label}
        assert list(lines) == [" ".join(curve) for curve in attention_speed.CURVES]
        for c, line in enumerate(lines.values()):
            np.testing.assert_allclose(line, [[512, 1000, 2048], [c + 2] * 3])
        assert [t.get_text() for t in ax.get_xticklabels()] == ["512", "1000", "2k"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("c.png", "d.png"):
            attention_speed.main([str(path), "--out", str(tmp_path / name)])
    assert (tmp_path / "c.svg").read_bytes() == (tmp_path / "d.svg").read_bytes()


def test_speed_table_of_attention_sets_the_default_first(tmp_path, capsys):
    speed_table.main([str(write_bench(tmp_path / "a.json", both_ms=9e3))])
    said = capsys.readouterr().out
    header, _, first, second = said.splitlines()[:4]
    assert header.startswith("| T | forward, ms | of PyTorch's default | of FlashAttention-2 | forward and backward")
    assert first == f"| 512 | 1024.00 | 2.00 | 0.67 | 9000.00 | {9e3 / 1536:.2f} | {9e3 / 4608:.2f} | 2.00 |"
    assert second == "| 1000 | 2000.00 | 2.00 | 0.67 | 6000.00 | 2.00 | 0.67 | 2.00 |"
    words = " ".join(said.split())
    assert "takes 2.00 to 2.00 of the time of PyTorch's default attention forward, and 2.00 to 5.86 forward" in words


def test_speed_table_names_a_record_that_lacks_a_row_and_records_that_make_no_table(tmp_path, capsys):
    a, b = write_bench(tmp_path / "a.json"), write_bench(tmp_path / "b.json", backend="gone")
    said = refusal(capsys, speed_table.main, b)
    assert said == "error: a length has no times of MLR attention, triton or blockwise; make the record again\n"
    assert f"or several of step, please; not {a} {b}" in refusal(capsys, speed_table.main, a, b)


def test_attention_speed_names_what_is_missing(tmp_path, capsys):
    path, out = tmp_path / "a.json", tmp_path / "fig.png"
    for changes, said in (
        (dict(forward_ms=None, note="WRONG"), "MLR triton at T = 512 has no forward_ms (WRONG)"),
        (dict(both_ms=None), "MLR triton at T = 512 has no both_ms (no value)"),
        (dict(backend="dense"), "MLR triton at T = 512 has no forward_ms, both_ms (no such row)"),
    ):
        write_bench(path, **changes)
        message = refusal(capsys, attention_speed.main, path, "--out", out)
        assert f"{path}: {said}" in message
        assert f"make it again, on CUDA, with: python bench.py attention --out={path}" in message
    step = json.dumps(dict(command="step", rows=[1]))
    for text, said in (("{", "cannot be read"), (step, "no rows of bench.py attention; make it with")):
        path.write_text(text)
        assert said in refusal(capsys, attention_speed.main, path, "--out", out)
    assert not list(tmp_path.glob("fig*"))
