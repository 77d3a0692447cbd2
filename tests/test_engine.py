"""The step that a CUDA graph replays: the same program on the CPU beside the ordinary step, and recorded on CUDA."""

import contextlib
import signal

import pytest
import torch
from compare import assert_same, relative_error
from runs import STRUCTURES as EVERY_STRUCTURE
from runs import (
    TINY_ICL,
    TINY_LM,
    assert_same_run,
    begin,
    checkpoint,
    flags,
    initial_weights,
    metrics,
    record,
    signal_at,
    stops,
    timeless,
)

import train
import train_ICL
from data import windows
from data.icl_regression import stream
from training import capture
from training.capture import StaticStep
from training.configurator import configure
from training.optimizer import Optimizer
from training.process import Process

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
STRUCTURES = {"low_rank": {}, "bilinear_MLR": {}, "bilinear_BTT": dict(btt_tt_rank=2)}
GROWING = dict(  # dims and points grow at steps 8 and 16
    training_curriculum_dims_interval=8, training_curriculum_points_interval=8, max_iters=20, eval_interval=10,
    log_interval=1,
)  # fmt: skip


def settings_of(script, *settings, **more):
    return [TINY_LM if script is train else TINY_ICL | GROWING, *settings, more]


def fit(script, *settings, **more):
    script.main(flags(*settings_of(script, *settings, **more)))


def start(script, *settings, **more):
    return begin(script, *settings_of(script, *settings, **more))


@pytest.fixture
def static(monkeypatch):
    """A context in which steps are the program that a GPU records, called step by step."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(capture, "wanted", lambda *_: True)
            yield

    return context


@pytest.fixture
def padded(monkeypatch):
    """A context in which ordinary steps take prompts of full length, as they do where the model is compiled."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(Process, "fixed_shapes", property(lambda self: True, lambda self, value: None), raising=False)
            yield

    return context


def losses(out_dir, name="overall_loss"):
    """{step: loss} of a run's progress lines."""
    return {m["step"]: m[name] for m in metrics(out_dir) if name in m}


# --- the program, on the CPU ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("structure", EVERY_STRUCTURE)
def test_the_static_program_takes_all_micro_batches(structure, dtype, data_dir, tmp_path, static):
    """Bit for bit, three of them a step, evaluations between."""
    settings = dict(EVERY_STRUCTURE[structure], token_mixing_struct=structure, dtype=dtype, data_dir=data_dir)
    settings |= dict(dropout=0.0, gradient_accumulation_steps=3, log_interval=1)
    fit(train, settings, out_dir=tmp_path / "ordinary")
    with static():
        fit(train, settings, out_dir=tmp_path / "static")
    assert_same_run(tmp_path / "static", tmp_path / "ordinary")


def test_dropout_of_static_micro_batches(data_dir, tmp_path, static):
    """One alone drops what the ordinary step drops; after the first it goes on, as a function of the step."""
    for micro_batches, same in [(1, True), (2, False)]:
        settings = dict(data_dir=data_dir, gradient_accumulation_steps=micro_batches, dropout=0.5, log_interval=1)
        fit(train, settings, out_dir=tmp_path / f"ordinary {micro_batches}")
        with static():
            for name in ("static", "again"):
                fit(train, settings, out_dir=tmp_path / f"{name} {micro_batches}")
        ordinary, recorded, again = (
            timeless(metrics(tmp_path / f"{name} {micro_batches}")) for name in ("ordinary", "static", "again")
        )
        assert recorded == again
        assert (recorded == ordinary) == same


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_static_program_is_the_ordinary_step(structure, tmp_path, static, padded):
    """Bit for bit, dropout included, over a curriculum that grows."""
    settings = dict(STRUCTURES[structure], token_mixing_struct=structure)
    with padded():
        fit(train_ICL, settings, out_dir=tmp_path / "ordinary")
    with static():
        fit(train_ICL, settings, out_dir=tmp_path / "static")
    assert_same_run(tmp_path / "static", tmp_path / "ordinary")
    assert len(losses(tmp_path / "static")) == 20


@pytest.mark.parametrize("step", [0, 8])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_padded_prompts_give_the_loss_and_the_gradients_of_short_ones(structure, step, tmp_path, padded):
    settings = dict(STRUCTURES[structure], token_mixing_struct=structure, dropout=0.0, out_dir=tmp_path / "short")
    _, short = start(train_ICL, settings)
    with padded():
        _, full = start(train_ICL, settings, out_dir=tmp_path / "full")
    assert [len(run.prompts.at(step)[2]) for run in (short, full)] == [4 if step == 0 else 6, 8]
    results = []
    for run in (short, full):
        torch.manual_seed(0)
        for p in run.model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        losses = train_ICL.losses(run.network, run.layout, *run.prompts.at(step))
        losses["overall_loss"].backward()
        results.append([*losses.values(), *(p.grad for p in run.model.parameters())])
    names = ["overall_loss", "zero", *(name for name, _ in short.model.named_parameters())]
    assert_same(results[1], results[0], names, tolerance=2e-5)


def test_padded_prompts_are_counted_and_evaluated_like_short_ones(tmp_path, static):
    """At a small rate: Adam makes full steps of gradients that are 0 but for rounding, so that runs drift apart."""
    slow = dict(training_learning_rate=1e-5, dropout=0.0)
    fit(train_ICL, slow, out_dir=tmp_path / "short")
    with static():
        fit(train_ICL, slow, out_dir=tmp_path / "padded")
    assert losses(tmp_path / "padded") == pytest.approx(losses(tmp_path / "short"), rel=1e-4)
    for got, want in zip(metrics(tmp_path / "padded"), metrics(tmp_path / "short"), strict=True):
        names = ("step", "tokens", "compute", "non_emb_compute", "paper_compute", "n_dims", "n_points", "lr")
        assert [got.get(name) for name in names] == [want.get(name) for name in names]
        if "eval/last" in want:
            assert got["eval_pointwise/loss"] == pytest.approx(want["eval_pointwise/loss"], rel=1e-4)


@pytest.mark.parametrize("after", ["static", "padded"])
def test_a_resume_goes_on_with_either_step(after, tmp_path, monkeypatch, static, padded):
    with padded():
        fit(train_ICL, out_dir=tmp_path / "whole")
    with static():
        stop_at(monkeypatch, 12, train_ICL, out_dir=tmp_path / "parts")
    with dict(static=static, padded=padded)[after]():
        fit(train_ICL, out_dir=tmp_path / "parts", init_from="resume")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def stop_at(monkeypatch, step, script, *settings, **more):
    """A run that is told to stop when so many steps are done."""
    with monkeypatch.context() as patch:
        signal_at(patch, script, step - 1, signal.SIGUSR1)
        with pytest.raises(SystemExit):
            fit(script, *settings, **more)
    assert checkpoint(more["out_dir"])["step"] == step


def spoil_prompts(monkeypatch, step):
    """Let the answers in the prompts of a step be infinite."""
    at = stream.PromptStream.at

    def patched(self, now):
        given = at(self, now)
        if now == step:
            given[1].fill_(torch.inf)
        return given

    monkeypatch.setattr(stream.PromptStream, "at", patched)


def test_the_step_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys, static):
    spoil_prompts(monkeypatch, 5)
    with pytest.raises(SystemExit) as end, static():
        fit(train_ICL, out_dir=tmp_path, log_interval=4)
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
    fit(train_ICL, out_dir=tmp_path, compile=True)
    assert len(losses(tmp_path)) == 20
    assert len(shapes) == 2


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_the_mode_of_the_compiler(mode, tmp_path, monkeypatch):
    """It gets PyTorch's name; the graphs are ours, in either."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: asked.append(mode) or model)
    fit(train_ICL, out_dir=tmp_path, compile=True, compile_mode=mode)
    assert asked == [{"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}[mode]]


# --- what a checkpoint holds of the optimizer ---


def test_a_resume_computes_its_own_way(tmp_path, monkeypatch):
    """Whatever a checkpoint of a GPU says in the optimizer's groups."""
    fit(train_ICL, out_dir=tmp_path / "whole")
    stop_at(monkeypatch, 12, train_ICL, out_dir=tmp_path / "parts")
    saved = checkpoint(tmp_path / "parts")
    for group in saved["optimizer"]["param_groups"]:
        assert type(group["lr"]) is float
        group.update(capturable=True, fused=True, foreach=True, lr=torch.tensor(1.0))
    torch.save(saved, tmp_path / "parts" / "ckpt.pt")
    fit(train_ICL, out_dir=tmp_path / "parts", init_from="resume")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_learning_rates_on_the_device_are_saved_as_numbers():
    cfg = configure(train_ICL.Settings, flags(TINY_ICL))
    model = train_ICL.InContextRegressor(cfg.model_config(block_size=16), 4)
    plain, tensors = (Optimizer(model, 1e-3, cfg, device) for device in (CPU, GPU))
    assert all(isinstance(group["lr"], torch.Tensor) for group in tensors.adamw.param_groups)
    got, want = (optimizer.state() for optimizer in (tensors, plain))
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
    max_iters=30, eval_interval=15, training_curriculum_dims_start=8, training_curriculum_points_start=16
)


@cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_captured_run_is_the_eager_one(structure, dtype, tmp_path):
    settings = dict(ON_GPU, **STEADY, **STRUCTURES[structure], token_mixing_struct=structure, dtype=dtype)
    for choice in ("True", "False"):
        fit(train_ICL, settings, out_dir=tmp_path / choice, cuda_graph=choice)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=tolerance)
    assert len(losses(tmp_path / "True")) == 30
    for got, want in zip(metrics(tmp_path / "True"), metrics(tmp_path / "False"), strict=True):
        if "eval/last" in want:
            assert got["eval_pointwise/loss"] == pytest.approx(want["eval_pointwise/loss"], rel=tolerance)
    before = initial_weights(train_ICL, flags(*settings_of(train_ICL, settings)))
    got, want = (checkpoint(tmp_path / choice) for choice in ("True", "False"))
    assert {state["step"].item() for state in got["optimizer"]["state"].values()} == {30}
    moved = [torch.cat([(saved["model"][k] - w).flatten() for k, w in before.items()]) for saved in (got, want)]
    assert relative_error(*moved) < (0.02 if dtype == "float32" else 0.2)


def recordings(monkeypatch):
    """A list to which every recording adds how many steps were called before it."""
    recorded, record_step = [], StaticStep._record
    monkeypatch.setattr(StaticStep, "_record", lambda self: (recorded.append(self.calls), record_step(self)))
    return recorded


@cuda
def test_a_graph_is_recorded_once_for_a_growing_curriculum(tmp_path, monkeypatch):
    recorded = recordings(monkeypatch)
    fit(train_ICL, ON_GPU, out_dir=tmp_path / "True", cuda_graph="True")
    assert recorded == [capture.WARM_UP]
    fit(train_ICL, ON_GPU, out_dir=tmp_path / "False", cuda_graph="False")
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)  # padded


def take_steps_that_wait_for_nothing(steps, run):
    for _ in range(capture.WARM_UP + 1):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.meter.count == run.loop.step == capture.WARM_UP + 6


@cuda
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_captured_step_waits_for_nothing(structure, tmp_path, monkeypatch):
    """The making of the next prompts included."""
    monkeypatch.setattr(stream, "BLOCK_STEPS", 3)
    settings = dict(ON_GPU | STEADY, **STRUCTURES[structure], token_mixing_struct=structure, log_interval=1000)
    recorded = recordings(monkeypatch)
    steps, run = start(train_ICL, settings, out_dir=tmp_path)
    take_steps_that_wait_for_nothing(steps, run)
    assert recorded == [capture.WARM_UP]
    moments = run.optimizer.state()["state"].values()
    assert {state["step"].item() for state in moments} == {run.loop.step}


@cuda
def test_dropout_of_replayed_steps(tmp_path, monkeypatch):
    """Another one at every step, though the prompts are the same: the pool is one batch and the rates are 0."""
    same = dict(training_num_training_examples=4, dropout=0.5, log_interval=1)
    monkeypatch.setattr(train_ICL, "rate_factor", lambda cfg, step: 1.0 if step < 6 else 0.0)
    found = []
    for name in ("first", "again"):
        fit(train_ICL, ON_GPU, STEADY, same, out_dir=tmp_path / name)
        found.append([loss for step, loss in losses(tmp_path / name).items() if step > 7])
    first, again = found
    assert len(set(first)) == len(first)
    assert again == pytest.approx(first, rel=1e-5)


@cuda
def test_captured_then_eager_then_captured(tmp_path, monkeypatch):
    settings = dict(ON_GPU | STEADY, dropout=0.2)
    parts = dict(settings, out_dir=tmp_path / "parts", init_from="auto")
    fit(train_ICL, settings, out_dir=tmp_path / "whole", cuda_graph="True")
    stop_at(monkeypatch, 10, train_ICL, parts, cuda_graph="True", out_dir=tmp_path / "parts")
    stop_at(monkeypatch, 20, train_ICL, parts, cuda_graph="False", out_dir=tmp_path / "parts")
    fit(train_ICL, parts, cuda_graph="True")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    groups = checkpoint(tmp_path / "parts")["optimizer"]["param_groups"]
    assert all(type(group["lr"]) is float for group in groups)


@cuda
def test_a_captured_runs_checkpoint_goes_on_on_the_cpu(tmp_path):
    """And the other way round."""
    settings = ON_GPU | STEADY
    fit(train_ICL, settings, out_dir=tmp_path / "run", cuda_graph="True", max_iters=30)
    weights = {name: w.cpu() for name, w in checkpoint(tmp_path / "run")["model"].items()}
    for device in ("cpu", "cuda"):
        more = dict(settings, out_dir=tmp_path / "run", init_from="resume", device=device)
        steps, run = start(train_ICL, more, max_iters=100)
        for name, w in run.model.state_dict().items():
            assert torch.equal(w.cpu(), weights[name]), name
        steps.close()
        fit(train_ICL, more, max_iters=run.loop.step + capture.WARM_UP + 2)
        weights = {name: w.cpu() for name, w in checkpoint(tmp_path / "run")["model"].items()}


@cuda
def test_a_compiled_and_captured_run(tmp_path):
    for choice in ("True", "False"):
        fit(train_ICL, ON_GPU, out_dir=tmp_path / choice, cuda_graph=choice, compile=True)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


@cuda
def test_a_captured_step_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    spoil_prompts(monkeypatch, 7)
    with pytest.raises(SystemExit):
        fit(train_ICL, ON_GPU, STEADY, out_dir=tmp_path, log_interval=10)
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
        fit(train, settings, out_dir=tmp_path / choice, cuda_graph=choice)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name, count in [("train/loss", 24), ("val/loss", 3)]:
        got, want = (losses(tmp_path / choice, name) for choice in ("True", "False"))
        assert got == pytest.approx(want, rel=tolerance)
        assert len(got) == count
    before = initial_weights(train, flags(*settings_of(train, settings)))
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
    recorded = recordings(monkeypatch)
    steps, run = start(train, settings, out_dir=tmp_path, log_interval=1000, eval_interval=1000)
    take_steps_that_wait_for_nothing(steps, run)
    assert len(recorded) == (choice == "True")
