"""Several runs in one process: each as it would be alone, bit for bit, or to rounding as part of a pack."""

import functools
import os
import signal

import pytest
import torch
from compare import assert_same
from runs import TINY_ICL, TINY_LM, assert_same_run, checkpoint, flags, metrics, record

import train
import train_ICL
from scripts.icl_regression import sweep
from training import together
from training.configurator import configure
from training.together import Pack, Plan, fit_together

UNLIKE = {  # name: what it differs in; no two are of one shape
    "first": dict(seed=1),
    "second": dict(seed=2, token_mixing_struct="bilinear_BTT", dropout=0.2),
    "third": dict(seed=3, max_iters=2),
}
ALIKE = {  # rates at which rounding does not grow: Adam makes full steps of gradients that are 0 but for rounding
    "first": dict(seed=1, training_learning_rate=1e-5),
    "second": dict(seed=2, training_learning_rate=1e-5),
    "third": dict(seed=1, training_learning_rate=3e-5),
}
PACKED = dict(dropout=0.0, log_interval=1)
STRUCTURES = {
    "low_rank": {}, "bilinear_MLR": {}, "bilinear_BTT": dict(btt_tt_rank=2), "bilinear_MLBTC": dict(mlbtc_family="mlr"),
    "multi_level_low_rank": {},
}  # fmt: skip


def plan(module=train_ICL, experiment=train_ICL.InContextRegression, tiny=TINY_ICL, **settings):
    cfg = configure(module.Settings, flags(tiny, settings))
    return Plan(cfg, lambda: experiment(cfg))


def plans(folder, runs, **more):
    return [plan(out_dir=folder / name, **{**more, **run}) for name, run in runs.items()]


def fit_alone(folder, runs, **more):
    for each in plans(folder, runs, **more):
        each.build().fit()


def assert_same_curves(got_dir, want_dir, rel=1e-4):
    """Every number of every line but the clock's, to a tolerance."""
    for got, want in zip(metrics(got_dir), metrics(want_dir), strict=True):
        assert got.keys() == want.keys()
        for name in want.keys() - {"seconds", "tokens_per_s", "mfu", "baselines"}:
            assert got[name] == pytest.approx(want[name], rel=rel), (name, want["step"])


@pytest.mark.parametrize("jobs", [1, 5])
def test_unlike_runs_are_as_they_are_alone(jobs, tmp_path):
    fit_alone(tmp_path / "alone", UNLIKE)
    fit_together(plans(tmp_path / "together", UNLIKE), jobs)
    for name in UNLIKE:
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name)
        assert record(tmp_path / "together" / name)["together"] == 1
        assert "step 2/" in (tmp_path / "together" / name / "output.txt").read_text()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed_runs_have_the_curves_they_have_alone(structure, tmp_path):
    settings = dict(PACKED, **STRUCTURES[structure], token_mixing_struct=structure)
    fit_alone(tmp_path / "alone", ALIKE, **settings)
    fit_together(plans(tmp_path / "together", ALIKE, **settings), jobs=3)
    for name in ALIKE:
        assert_same_curves(tmp_path / "together" / name, tmp_path / "alone" / name)
        assert record(tmp_path / "together" / name)["together"] == 3
        assert record(tmp_path / "together" / name)["status"] == "finished"
        sizes = [(tmp_path / how / name / "ckpt.pt").stat().st_size for how in ("together", "alone")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)  # its own weights, not those of all
    ends = [metrics(tmp_path / "together" / name)[-1]["eval/last"] for name in ALIKE]
    assert len(set(ends)) == 3


def gradients(experiment, *inputs):
    """Losses and gradients of one run, alone."""
    losses = experiment.losses(experiment.model, *inputs)
    objective = next(iter(losses.values()))
    return [*losses.values(), *torch.autograd.grad(objective, list(experiment.model.parameters()))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_recorded_pack_has_the_curves_of_runs_alone(structure, compiled, tmp_path):
    settings = dict(PACKED, **STRUCTURES[structure], token_mixing_struct=structure, device="cuda", compile=compiled)
    settings |= dict(max_iters=12, training_learning_rate=1e-5)
    fit_alone(tmp_path / "alone", ALIKE, **settings)
    fit_together(plans(tmp_path / "together", ALIKE, **settings), jobs=3)
    for name in ALIKE:
        assert_same_curves(tmp_path / "together" / name, tmp_path / "alone" / name, rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_losses_and_gradients_of_a_pack(structure, compiled, tmp_path):
    if compiled and structure != "bilinear_BTT":
        pytest.skip("compiling takes long; the others go the same way")
    settings = dict(PACKED, **STRUCTURES[structure], token_mixing_struct=structure, compile=compiled)
    runs = [each.build() for each in plans(tmp_path, ALIKE, **settings)]
    torch.manual_seed(0)
    for p in (p for run in runs for p in run.model.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    inputs = [run.inputs(0) for run in runs]
    want = [gradients(run, *given) for run, given in zip(runs, inputs, strict=True)]
    pack = Pack(runs)
    losses = pack.losses(pack.stacked, *(torch.stack(same) for same in zip(*inputs, strict=True)))
    got = [*losses.values(), *torch.autograd.grad(losses["overall_loss"].sum(), pack.stacked)]
    for k, one in enumerate(want):
        assert_same([x[k] for x in got], one, [*losses, *pack.names], tolerance=2e-5)


def test_language_models_are_packed_too(data_dir, tmp_path):
    tiny = TINY_LM | dict(dropout=0.0, log_interval=1, data_dir=data_dir, dtype="bfloat16")
    language = functools.partial(plan, train, train.LanguageModelling, tiny)
    runs = {"a": dict(seed=1, init_lr=1e-5), "b": dict(seed=2, init_lr=3e-5)}
    for name, run in runs.items():
        language(out_dir=tmp_path / "alone" / name, **run).build().fit()
    fit_together([language(out_dir=tmp_path / "together" / name, **run) for name, run in runs.items()], jobs=2)
    for name in runs:
        assert record(tmp_path / "together" / name)["together"] == 2
        assert_same_curves(tmp_path / "together" / name, tmp_path / "alone" / name, rel=2e-2)


def test_runs_are_packed_by_shape(tmp_path):
    alike = plans(tmp_path / "alike", {str(n): dict(seed=n) for n in range(5)}, dropout=0.0)
    wider = plans(tmp_path / "wider", ALIKE, dropout=0.0, d_model=32)
    dropping = plans(tmp_path / "dropping", ALIKE)
    found = [len(part) for part in together.parts([*alike, *wider, *dropping], jobs=4)]
    assert found == [3, 2, 3, 1, 1, 1]
    for part in together.parts([*alike, *wider], jobs=4):
        assert len({plan.settings.d_model for plan in part}) == 1


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (dict(dropout=0.1), "dropout"),
        (dict(dtype="float16"), "float16"),
        (dict(token_mixing_struct="low_rank_with_gswa"), "FlexAttention"),
        (dict(token_mixing_struct="bilinear_BTT", d_model=256), "queries 256 wide"),
        (dict(token_mixing_struct="bilinear_MLR", d_model=128, mlr_rank_list="0|0|0|0|0|64"), "queries 2048 wide"),
        (dict(d_qk_head=160), "queries 160 wide"),
        (dict(token_mixing_struct="bilinear_MLR", mlr_rank_list="many"), "mlr_rank_list"),
        (dict(), None),
    ],
)
def test_what_is_not_packed(settings, why, tmp_path):
    found = together.packing_refusal(plan(**{**PACKED, "out_dir": tmp_path, **settings}).settings)
    assert found is None if why is None else why in found


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    runs = dict(ALIKE, third=dict(seed=1, training_learning_rate=1e30))
    refused = plan(out_dir=tmp_path / "refused", batch_size=65)
    with pytest.raises(SystemExit, match="2 of 4 runs failed"):
        fit_together([*plans(tmp_path, runs, **PACKED, grad_clip=0), refused], jobs=3)
    said = capsys.readouterr()
    assert "a pool of at least that many" in said.err
    assert f"{tmp_path / 'third'} failed: the " in said.out
    assert not (tmp_path / "refused").exists()
    fit_alone(tmp_path / "alone", {"first": ALIKE["first"]}, **PACKED, grad_clip=0)
    assert_same_curves(tmp_path / "first", tmp_path / "alone" / "first")
    assert record(tmp_path / "second")["status"] == "finished"


def test_a_step_that_breaks_ends_all_of_a_pack(tmp_path, monkeypatch):
    def out_of_memory(self, *_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Pack, "_losses", out_of_memory)
    with pytest.raises(SystemExit, match="3 of 3 runs failed"):
        fit_together(plans(tmp_path, ALIKE, **PACKED), jobs=3)
    for name in ALIKE:
        assert record(tmp_path / name)["status"] == "failed: OutOfMemoryError: no memory"


def stop_after(monkeypatch, steps, folder):
    """A pack that is told to stop after so many steps."""
    made, step = [], Pack.step

    def step_then_signal(self):
        step(self)
        made.append(self)
        if len(made) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Pack, "step", step_then_signal)
        with pytest.raises(SystemExit) as end:
            fit_together(plans(folder, ALIKE, **PACKED), jobs=3)
    assert end.value.code == 128 + signal.SIGTERM
    assert [checkpoint(folder / name)["step"] for name in ALIKE] == [steps] * 3
    assert record(folder / "first")["status"] == "stopped: SIGTERM"


def test_a_signal_stops_all_and_the_same_command_goes_on(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    fit_together(plans(tmp_path / "whole", ALIKE, **PACKED), jobs=3)
    stop_after(monkeypatch, 3, tmp_path / "parts")
    fit_together(plans(tmp_path / "parts", ALIKE, **PACKED, init_from="auto"), jobs=3)
    for name in ALIKE:
        assert_same_run(tmp_path / "parts" / name, tmp_path / "whole" / name)  # bit for bit
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_run_begun_in_a_pack_goes_on_alone(tmp_path, monkeypatch):
    fit_alone(tmp_path / "whole", ALIKE, **PACKED)
    stop_after(monkeypatch, 3, tmp_path / "parts")
    fit_alone(tmp_path / "parts", ALIKE, **PACKED, init_from="resume")
    for name in ALIKE:
        assert_same_curves(tmp_path / "parts" / name, tmp_path / "whole" / name)


def test_runs_that_stand_at_different_steps(tmp_path):
    """One is resumed at step 3, where the curriculum is further than at the others' start, and ends before them."""
    fit_alone(tmp_path / "alone", ALIKE, **PACKED)
    ahead = plans(tmp_path / "together", ALIKE, **PACKED)[0].build()
    for _ in range(3):
        ahead._train_step()
    ahead.run.folder.mkdir(parents=True)
    ahead.run.save(ahead.state())
    fit_together(plans(tmp_path / "together", ALIKE, **PACKED, init_from="auto"), jobs=3)
    for name in ALIKE:
        got, want = (metrics(tmp_path / how / name) for how in ("together", "alone"))
        later = [line for line in want if line["step"] > (3 if name == "first" else -1)]
        assert [line["step"] for line in got] == [line["step"] for line in later]
        for line, expected in zip(got, later, strict=True):
            for key in ("overall_loss", "eval/last", "grad_norm"):
                if key in expected and line["step"] != 4:  # whose mean of losses began before the checkpoint
                    assert line[key] == pytest.approx(expected[key], rel=1e-4), (name, key, line["step"])


@pytest.mark.parametrize("name", ["first", "third"])
def test_a_run_that_has_no_step_to_make(name, tmp_path):
    """Its checkpoint is of its last step, as where a kill comes just before the end is recorded."""
    fit_alone(tmp_path / "together", {name: ALIKE[name]}, **PACKED)
    fit_alone(tmp_path / "alone", ALIKE, **PACKED)
    fit_together(plans(tmp_path / "together", ALIKE, **PACKED, init_from="auto"), jobs=3)
    for other in ALIKE:
        assert_same_curves(tmp_path / "together" / other, tmp_path / "alone" / other)
        assert record(tmp_path / "together" / other)["status"] == "finished"


def test_a_run_of_a_pack_that_is_past_its_last_step(data_dir, tmp_path, capsys):
    language = functools.partial(plan, train, train.LanguageModelling, TINY_LM, data_dir=data_dir, **PACKED)
    language(out_dir=tmp_path / "second").build().fit()
    shorter = [language(out_dir=tmp_path / name, max_iters=4, init_from="auto") for name in ("first", "second")]
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        fit_together(shorter, jobs=2)
    assert f"error: {tmp_path / 'second'} is at step 6, max_iters is 4; " in capsys.readouterr().err
    for name, steps in (("first", 4), ("second", 6)):
        about = record(tmp_path / name)
        assert (about["status"], about["settings"]["max_iters"]) == ("finished", steps)


def test_a_grid_in_one_process(tmp_path, capsys):
    tiny = "--n_layer=1 --batch_size=2 --max_iters=2 --eval_prompts=4 --log_interval=1 --compile=False --device=cpu"
    tiny += " --training_curriculum_adaptive_inc=False --n_positions=4"
    here = [f"--out_dir={tmp_path}", "--run=True", "--together=True", "--jobs=2"]
    sweep.main([*here, "--only=^standard_n16_d128_", f"--extra={tiny}"])
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) >= 2
    assert all(record(folder)["status"] == "finished" for folder in folders)
    assert {record(folder)["together"] for folder in folders} == {2}
    for folder in folders:  # the run's own command, which goes on with it alone
        script, *argv = record(folder)["argv"]
        assert script == "train_ICL.py"
        assert configure(train_ICL.Settings, argv) == configure(train_ICL.Settings, [*argv, f"--out_dir={folder}"])
    assert "finished" in capsys.readouterr().out
