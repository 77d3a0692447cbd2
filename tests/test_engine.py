"""The step that a CUDA graph replays: the same program on the CPU beside the ordinary step, and recorded on CUDA."""

import os
import signal

import pytest
import torch
from compare import assert_same, relative_error
from runs import STRUCTURES as EVERY_STRUCTURE
from runs import TINY_ICL, TINY_LM, assert_same_run, checkpoint, flags, metrics, record, stops

import train
import train_ICL
from data import windows
from data.icl_regression import stream
from training import capture
from training.capture import StaticStep
from training.configurator import configure
from training.loop import portable
from training.mup import adamw

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
STRUCTURES = {"low_rank": {}, "bilinear_MLR": {}, "bilinear_BTT": dict(btt_tt_rank=2)}
GROWING = dict(  # dims and points grow at steps 8 and 16
    training_curriculum_dims_interval=8, training_curriculum_points_interval=8, max_iters=20, eval_interval=10,
    log_interval=1,
)  # fmt: skip


def build(cls, *settings, **more):
    if issubclass(cls, train.LanguageModelling):
        return cls(configure(train.Settings, flags(TINY_LM, *settings, more)))
    return cls(configure(train_ICL.Settings, flags(TINY_ICL, GROWING, *settings, more)))


def fit(cls, *settings, **more):
    build(cls, *settings, **more).fit()


def losses(out_dir, name="overall_loss"):
    """{step: loss} of a run's progress lines."""
    return {m["step"]: m[name] for m in metrics(out_dir) if name in m}


class Padded(train_ICL.InContextRegression):
    """Ordinary steps on prompts of full length."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.fixed_shapes = True


class Static(Padded):
    """What a GPU records, called step by step."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.static_step = StaticStep(self._static_update, self.device)


class StaticLanguage(train.LanguageModelling):
    """The same of a language model."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.static_step = StaticStep(self._static_update, self.device)


# --- the program, on the CPU ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("structure", EVERY_STRUCTURE)
def test_the_static_program_takes_all_micro_batches(structure, dtype, data_dir, tmp_path):
    """Bit for bit, three of them a step, evaluations between."""
    settings = dict(EVERY_STRUCTURE[structure], token_mixing_struct=structure, dtype=dtype, data_dir=data_dir)
    settings |= dict(dropout=0.0, gradient_accumulation_steps=3, log_interval=1)
    fit(train.LanguageModelling, settings, out_dir=tmp_path / "ordinary")
    fit(StaticLanguage, settings, out_dir=tmp_path / "static")
    assert_same_run(tmp_path / "static", tmp_path / "ordinary")


def test_dropout_of_static_micro_batches(data_dir, tmp_path):
    """One alone drops what the ordinary step drops; after the first it goes on, as a function of the step."""
    for micro_batches, same in [(1, True), (2, False)]:
        settings = dict(data_dir=data_dir, gradient_accumulation_steps=micro_batches, dropout=0.5)
        runs = [build(cls, settings, out_dir=tmp_path) for cls in (train.LanguageModelling, *[StaticLanguage] * 2)]
        for run in runs:
            for _ in range(4):
                run._train_step()
        ordinary, static, again = ([*run.meter.read().values(), run.grad_norm.item()] for run in runs)
        assert static == again
        assert (static == ordinary) == same


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_static_program_is_the_ordinary_step(structure, tmp_path):
    """Bit for bit, dropout included, over a curriculum that grows."""
    settings = dict(STRUCTURES[structure], token_mixing_struct=structure)
    fit(Padded, settings, out_dir=tmp_path / "ordinary")
    fit(Static, settings, out_dir=tmp_path / "static")
    assert_same_run(tmp_path / "static", tmp_path / "ordinary")
    assert len(losses(tmp_path / "static")) == 20


@pytest.mark.parametrize("step", [0, 8])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_padded_prompts_give_the_loss_and_the_gradients_of_short_ones(structure, step, tmp_path):
    settings = dict(STRUCTURES[structure], token_mixing_struct=structure, dropout=0.0, out_dir=tmp_path)
    short, padded = (build(cls, settings) for cls in (train_ICL.InContextRegression, Padded))
    assert [len(run.inputs(step)[2]) for run in (short, padded)] == [4 if step == 0 else 6, 8]
    results = []
    for run in (short, padded):
        torch.manual_seed(0)
        for p in run.model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        losses = run.losses(run.network, *run.inputs(step))
        losses["overall_loss"].backward()
        results.append([*losses.values(), *(p.grad for p in run.model.parameters())])
    names = ["overall_loss", "zero", *(name for name, _ in short.model.named_parameters())]
    assert_same(results[1], results[0], names, tolerance=2e-5)


def test_padded_prompts_are_counted_and_evaluated_like_short_ones(tmp_path):
    """At a small rate: Adam makes full steps of gradients that are 0 but for rounding, so that runs drift apart."""
    slow = dict(training_learning_rate=1e-5, dropout=0.0)
    fit(train_ICL.InContextRegression, slow, out_dir=tmp_path / "short")
    fit(Static, slow, out_dir=tmp_path / "padded")
    assert losses(tmp_path / "padded") == pytest.approx(losses(tmp_path / "short"), rel=1e-4)
    for got, want in zip(metrics(tmp_path / "padded"), metrics(tmp_path / "short"), strict=True):
        names = ("step", "tokens", "compute", "non_emb_compute", "paper_compute", "n_dims", "n_points", "lr")
        assert [got.get(name) for name in names] == [want.get(name) for name in names]
        if "eval/last" in want:
            assert got["eval_pointwise/loss"] == pytest.approx(want["eval_pointwise/loss"], rel=1e-4)


@pytest.mark.parametrize("after", [Static, Padded])
def test_a_resume_goes_on_with_either_step(after, tmp_path, monkeypatch):
    fit(Padded, out_dir=tmp_path / "whole")
    stop_at(monkeypatch, 12, Static, out_dir=tmp_path / "parts")
    fit(after, out_dir=tmp_path / "parts", init_from="resume")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def stop_at(monkeypatch, step, cls, *settings, **more):
    """A run that is told to stop when so many steps are done."""
    with monkeypatch.context() as patch:
        at_inputs(patch, step - 1, lambda x, y, weight: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(SystemExit):
            fit(cls, *settings, **more)
    assert checkpoint(more["out_dir"])["step"] == step


def at_inputs(monkeypatch, step, action):
    """Do something with the inputs of a step."""
    inputs = train_ICL.InContextRegression.inputs

    def patched(self, now):
        given = inputs(self, now)
        if now == step:
            action(*given)
        return given

    monkeypatch.setattr(train_ICL.InContextRegression, "inputs", patched)


def test_the_step_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    at_inputs(monkeypatch, 5, lambda x, y, weight: y.fill_(torch.inf))
    with pytest.raises(SystemExit) as end:
        fit(Static, out_dir=tmp_path, log_interval=4)
    assert end.value.code == 1
    assert "the loss is not finite at step 5" in capsys.readouterr().err
    assert record(tmp_path)["status"] == "failed: the loss is not finite at step 5"


def test_the_memory_of_a_static_step_does_not_move():
    places, seen = set(), []

    def work(a, b):
        places.add((a.data_ptr(), b.data_ptr()))
        seen.append((a.tolist(), b.item()))

    step = StaticStep(work, CPU)
    given = [(torch.tensor([i, i + 1.0]), torch.tensor(i)) for i in range(3)]
    for inputs in given:
        step(*inputs)
    assert seen == [([i, i + 1.0], i) for i in range(3)]
    assert len(places) == 1
    assert given[0][0].data_ptr() not in [place for pair in places for place in pair]


def test_a_compiled_model_is_compiled_once(tmp_path, monkeypatch):
    """For training; the evaluation, which drops nothing, is another. The curriculum changes neither."""
    shapes = []

    def backend(graph, inputs):
        shapes.append(tuple(inputs[-1].shape))
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compiled(model, backend=backend))
    fit(train_ICL.InContextRegression, out_dir=tmp_path, compile=True)
    assert len(losses(tmp_path)) == 20
    assert len(shapes) == 2


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_the_mode_of_the_compiler(mode, tmp_path, monkeypatch):
    """It gets PyTorch's name; the graphs are ours, in either."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: asked.append(mode) or model)
    fit(train_ICL.InContextRegression, out_dir=tmp_path, compile=True, compile_mode=mode)
    assert asked == [{"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}[mode]]


# --- what a checkpoint holds of the optimizer ---


def test_a_resume_computes_its_own_way(tmp_path, monkeypatch):
    """Whatever a checkpoint of a GPU says in the optimizer's groups."""
    fit(Padded, out_dir=tmp_path / "whole")
    stop_at(monkeypatch, 12, Padded, out_dir=tmp_path / "parts")
    saved = checkpoint(tmp_path / "parts")
    for group in saved["optimizer"]["param_groups"]:
        assert type(group["lr"]) is float
        group.update(capturable=True, fused=True, foreach=True, lr=torch.tensor(1.0))
    torch.save(saved, tmp_path / "parts" / "ckpt.pt")
    fit(Padded, out_dir=tmp_path / "parts", init_from="resume")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_learning_rates_on_the_device_are_saved_as_numbers():
    model = train_ICL.InContextRegressor(configure(train_ICL.Settings, flags(TINY_ICL)).model_config(block_size=16), 4)
    plain, tensors = (adamw(model, 1e-3, device_type=device_type) for device_type in ("cpu", "cuda"))
    assert all(isinstance(group["lr"], torch.Tensor) for group in tensors.param_groups)
    got, want = (portable(optimizer.state_dict()) for optimizer in (tensors, plain))
    for g, w in zip(got["param_groups"], want["param_groups"], strict=True):
        assert type(g["lr"]) is float
        assert g["lr"] == pytest.approx(w["lr"], rel=1e-6)
        assert g["peak_lr"] == w["peak_lr"]


# --- where there can be a graph ---


@pytest.mark.parametrize(
    ("device", "dtype", "processes", "why"),
    [(GPU, "float32", 1, None), (GPU, "bfloat16", 1, None), (CPU, "float32", 1, "the device is cpu"),
     (GPU, "float16", 1, "float16"), (GPU, "float32", 2, "2 processes")],
)  # fmt: skip
def test_where_steps_are_replayed(device, dtype, processes, why):
    """By default wherever they can be; a run that insists where they cannot is refused."""
    assert capture.wanted("auto", device, dtype, processes) == (why is None)
    assert not capture.wanted("False", device, dtype, processes)
    if why is None:
        assert capture.wanted("True", device, dtype, processes)
    else:
        with pytest.raises(capture.BadInput, match=f"cuda_graph=True cannot be: {why}"):
            capture.wanted("True", device, dtype, processes)


@pytest.mark.parametrize("script", [train, train_ICL], ids=lambda script: script.__name__)
@pytest.mark.parametrize(("choice", "said"), [("True", "the device is cpu"), ("yes", "there are auto, True, False")])
def test_a_graph_that_cannot_be_is_refused(choice, said, script, data_dir, tmp_path, capsys):
    tiny = dict(TINY_LM, data_dir=data_dir) if script is train else TINY_ICL
    assert stops(script.main, flags(tiny, out_dir=tmp_path / "run", cuda_graph=choice)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- on CUDA ---

ON_GPU = dict(device="cuda", n_dims=8, d_model=32, n_head=4, dropout=0.0, training_learning_rate=3e-5)
STEADY = dict(  # 30 steps of one size
    max_iters=30, eval_interval=15, training_curriculum_dims_start=-1, training_curriculum_points_start=-1
)


@cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_captured_run_is_the_eager_one(structure, dtype, tmp_path):
    settings = dict(ON_GPU, **STEADY, **STRUCTURES[structure], token_mixing_struct=structure, dtype=dtype)
    for choice in ("True", "False"):
        fit(train_ICL.InContextRegression, settings, out_dir=tmp_path / choice, cuda_graph=choice)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=tolerance)
    assert len(losses(tmp_path / "True")) == 30
    for got, want in zip(metrics(tmp_path / "True"), metrics(tmp_path / "False"), strict=True):
        if "eval/last" in want:
            assert got["eval_pointwise/loss"] == pytest.approx(want["eval_pointwise/loss"], rel=tolerance)
    before = build(train_ICL.InContextRegression, settings, out_dir=tmp_path / "new").model.state_dict()
    got, want = (checkpoint(tmp_path / choice) for choice in ("True", "False"))
    assert {state["step"].item() for state in got["optimizer"]["state"].values()} == {30}
    moved = [torch.cat([(saved["model"][k] - w).flatten() for k, w in before.items()]) for saved in (got, want)]
    assert relative_error(*moved) < (0.02 if dtype == "float32" else 0.2)


@cuda
def test_a_graph_is_recorded_once_for_a_growing_curriculum(tmp_path, monkeypatch):
    recorded, record_step = [], StaticStep._record
    monkeypatch.setattr(StaticStep, "_record", lambda self: (recorded.append(self.calls), record_step(self)))
    fit(train_ICL.InContextRegression, ON_GPU, out_dir=tmp_path / "True", cuda_graph="True")
    assert recorded == [capture.WARM_UP]
    fit(train_ICL.InContextRegression, ON_GPU, out_dir=tmp_path / "False", cuda_graph="False")
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)  # padded


def take_steps_that_wait_for_nothing(experiment):
    for _ in range(capture.WARM_UP + 1):
        experiment._train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            experiment._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert experiment.meter.count == experiment.step == capture.WARM_UP + 6


@cuda
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_captured_step_waits_for_nothing(structure, tmp_path, monkeypatch):
    """The making of the next prompts included."""
    monkeypatch.setattr(stream, "BLOCK_STEPS", 3)
    settings = dict(ON_GPU | STEADY, **STRUCTURES[structure], token_mixing_struct=structure)
    experiment = build(train_ICL.InContextRegression, settings, out_dir=tmp_path)
    take_steps_that_wait_for_nothing(experiment)
    assert experiment.static_step.graph is not None
    moments = experiment.optimizer.state_dict()["state"].values()
    assert {state["step"].item() for state in moments} == {experiment.step}


@cuda
def test_dropout_of_replayed_steps(tmp_path, monkeypatch):
    """Another one at every step, though the prompts are the same: the pool is one batch and the rates are 0."""
    same = dict(training_num_training_examples=4, dropout=0.5)
    experiment = build(train_ICL.InContextRegression, ON_GPU, STEADY, same, out_dir=tmp_path)
    for _ in range(6):
        experiment._train_step()
    monkeypatch.setattr(experiment, "lr_factor", lambda step: 0.0)
    experiment.meter.read()

    def loss(step):
        experiment.step = step
        experiment._train_step()
        return experiment.meter.read()["overall_loss"]

    first = [loss(step) for step in (6, 7, 8, 9)]
    assert min(abs(a - b) for i, a in enumerate(first) for b in first[:i]) > 1e-5
    assert [loss(step) for step in (6, 7, 8, 9)] == pytest.approx(first, rel=1e-5)


@cuda
def test_captured_then_eager_then_captured(tmp_path, monkeypatch):
    settings = dict(ON_GPU | STEADY, dropout=0.2)
    parts = dict(settings, out_dir=tmp_path / "parts", init_from="auto")
    fit(train_ICL.InContextRegression, settings, out_dir=tmp_path / "whole", cuda_graph="True")
    stop_at(monkeypatch, 10, train_ICL.InContextRegression, parts, cuda_graph="True", out_dir=tmp_path / "parts")
    stop_at(monkeypatch, 20, train_ICL.InContextRegression, parts, cuda_graph="False", out_dir=tmp_path / "parts")
    fit(train_ICL.InContextRegression, parts, cuda_graph="True")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    groups = checkpoint(tmp_path / "parts")["optimizer"]["param_groups"]
    assert all(type(group["lr"]) is float for group in groups)


@cuda
def test_a_captured_runs_checkpoint_goes_on_on_the_cpu(tmp_path):
    """And the other way round."""
    settings = ON_GPU | STEADY
    fit(train_ICL.InContextRegression, settings, out_dir=tmp_path / "run", cuda_graph="True", max_iters=30)
    weights = {name: w.cpu() for name, w in checkpoint(tmp_path / "run")["model"].items()}
    for device in ("cpu", "cuda"):
        experiment = build(
            train_ICL.InContextRegression, settings, out_dir=tmp_path / "run", init_from="resume", device=device
        )
        for name, w in experiment.model.state_dict().items():
            assert torch.equal(w.cpu(), weights[name]), name
        for _ in range(capture.WARM_UP + 2):
            experiment._train_step()
        experiment.meter.check()
        experiment._save()
        weights = {name: w.cpu() for name, w in experiment.model.state_dict().items()}


@cuda
def test_a_compiled_and_captured_run(tmp_path):
    for choice in ("True", "False"):
        fit(train_ICL.InContextRegression, ON_GPU, out_dir=tmp_path / choice, cuda_graph=choice, compile=True)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


@cuda
def test_a_captured_step_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    at_inputs(monkeypatch, 7, lambda x, y, weight: y.fill_(torch.inf))
    with pytest.raises(SystemExit):
        fit(train_ICL.InContextRegression, ON_GPU, STEADY, out_dir=tmp_path, log_interval=10)
    assert "the loss is not finite at step 7" in capsys.readouterr().err


LANGUAGE_ON_GPU = dict(  # heads 32 wide, so that every fast path takes them
    device="cuda", n_head=2, d_model=64, block_size=128, batch_size=2, gradient_accumulation_steps=2, dropout=0.0,
    init_lr=3e-5, max_iters=24, eval_interval=12, log_interval=1,
)  # fmt: skip
LANGUAGE_STRUCTURES = {
    "low_rank": {},
    "multi_level_low_rank": dict(mlr_rank_list="16|8|8", mlr_block_divide_by_num_levels=True),
    "low_rank_with_sliding_window": dict(sliding_block_size=40),
    "low_rank_with_gswa": dict(gswa_rank_list="16|16", sliding_block_size=40),
}
language = pytest.mark.parametrize("structure", LANGUAGE_STRUCTURES)


def language_settings(structure, data_dir, **more):
    return dict(
        LANGUAGE_ON_GPU, **LANGUAGE_STRUCTURES[structure], token_mixing_struct=structure, data_dir=data_dir, **more
    )


@cuda
@language
@pytest.mark.parametrize(("dtype", "compile"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_a_captured_language_model_is_the_eager_one(structure, dtype, compile, data_dir, tmp_path):
    settings = language_settings(structure, data_dir, dtype=dtype, compile=compile)
    for choice in ("True", "False"):
        fit(train.LanguageModelling, settings, out_dir=tmp_path / choice, cuda_graph=choice)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name, count in [("train/loss", 24), ("val/loss", 3)]:
        got, want = (losses(tmp_path / choice, name) for choice in ("True", "False"))
        assert got == pytest.approx(want, rel=tolerance)
        assert len(got) == count
    before = build(train.LanguageModelling, settings, out_dir=tmp_path / "new").model.state_dict()
    got, want = (checkpoint(tmp_path / choice)["model"] for choice in ("True", "False"))
    moved = [torch.cat([(saved[k].cpu() - w.cpu()).flatten() for k, w in before.items()]) for saved in (got, want)]
    assert relative_error(*moved) < (0.02 if dtype == "float32" else 0.2)


@cuda
@language
@pytest.mark.parametrize("choice", ["True", "False"])
def test_a_step_of_a_language_model_waits_for_nothing(choice, structure, data_dir, tmp_path, monkeypatch):
    """The drawing of the next windows included."""
    monkeypatch.setattr(windows, "BLOCK_STEPS", 3)
    settings = language_settings(structure, data_dir, dtype="bfloat16", cuda_graph=choice)
    experiment = build(train.LanguageModelling, settings, out_dir=tmp_path)
    take_steps_that_wait_for_nothing(experiment)
    assert (experiment.static_step is not None) == (choice == "True")
