"""Noisy recall, the task whose prompt ends in a query: its prompts, tokens, baselines, runs, and what it refuses."""

import math

import pytest
import torch
from compare import relative_error
from runs import TINY_ICL, assert_equal, assert_same_run, checkpoint, flags, metrics, record, signal_at, stops

import evaluate_ICL
import train_ICL
from data.icl_regression.baselines import SHARPNESS, recall_errors
from data.icl_regression.curriculum import Curriculum
from data.icl_regression.layouts import LAYOUTS
from data.icl_regression.philox import bits, normal
from data.icl_regression.sampler import evaluation_prompts, pairs_and_query, sample_prompts, training_examples
from data.icl_regression.stream import PromptStream
from data.icl_regression.tasks import QUERY_TASKS, TASKS, Purpose
from plots import icl_examples
from training import capture
from training.configurator import configure
from training.errors import BadInput
from training.together import Plan, fit_together

SEED = 7
TASK = "noisy_recall"
TINY = dict(
    TINY_ICL, training_task=TASK, n_positions=6, training_curriculum_dims_start=-1, training_curriculum_points_start=-1
)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def argv(*settings, **more):
    return flags(TINY, *settings, more)


def prompts(examples, n_dims=6, n_points=9, **options):
    return sample_prompts(TASK, SEED, torch.as_tensor(examples), n_dims, n_points, **options)


# --- the prompts ---


@pytest.mark.parametrize(("dims", "noise"), [(5, 0.7), (3, 0.0), (1, 2.0)])
def test_the_prompt_reads_like_its_definition(dims, noise):
    n_dims, points = 5, 8
    x, y = prompts([0, 3, 2**40 + 1], n_dims, points, dims=dims, query_noise=noise)
    for b, example in enumerate([0, 3, 2**40 + 1]):
        e = torch.tensor([example])
        raw = normal(SEED, e, Purpose.X, (points, n_dims))[0].double().tolist()
        values = normal(SEED, e, Purpose.VALUES, (points - 1,))[0].tolist()
        j = bits(SEED, e, Purpose.RECALLED, 1).item() * (points - 1) // 2**32
        raw = [[v / math.sqrt(dims) if i < dims else 0.0 for i, v in enumerate(point)] for point in raw]
        keys = [unit(point) for point in raw[:-1]]
        query = unit([k + noise * v for k, v in zip(keys[j], raw[-1], strict=True)])
        assert relative_error(x[b], torch.tensor([*keys, query], dtype=torch.float64)) < 1e-6
        assert y[b].tolist() == [*values, values[j]]


def unit(v):
    length = math.sqrt(sum(c * c for c in v))
    return [c / length for c in v]


def test_moments():
    n, n_dims, pairs = 20_000, 16, 32
    x, y = prompts(torch.arange(n), n_dims, pairs + 1)
    assert x.dtype == y.dtype == torch.float32
    assert (x.double().norm(dim=2) - 1).abs().max() < 1e-6
    assert abs(y.mean()) < 4 / math.sqrt(n * pairs)
    assert abs(y[:, -1].square().mean() - 1) < 4 * math.sqrt(2 / n)  # predicting zero costs 1
    assert (x.mean((0, 1)).abs() < 4 / math.sqrt(n * pairs)).all()
    asked = (y[:, :-1] == y[:, -1:]).float().argmax(1)
    share = torch.bincount(asked, minlength=pairs) / n
    assert (share - 1 / pairs).abs().max() < 4 * math.sqrt(1 / pairs / n)
    similar = (x[:, :-1] * x[:, -1:]).sum(2)
    right = similar.gather(1, asked[:, None])
    others = similar.sum(1) - right.squeeze(1)
    assert abs(others.mean()) < 4 * math.sqrt((pairs - 1) / n_dims / n)
    assert abs(right.mean() - 0.81) < 0.02  # 1 / sqrt(1 + 0.7^2) = 0.82 in many dimensions
    assert abs((y[:, :-1] * similar).mean(1).mean()) < 4 / math.sqrt(n * pairs)


def test_without_noise_the_query_is_one_of_the_x():
    x, y = prompts(range(50), query_noise=0)
    asked = (y[:, :-1] == y[:, -1:]).float().argmax(1)
    torch.testing.assert_close(x[torch.arange(50), asked], x[:, -1])


def test_a_prompt_depends_on_its_number_alone():
    numbers = [3, 2**40 + 1, 0, 17, 2**62]
    x, y = prompts(numbers)
    for order in ([4, 3, 2, 1, 0], [2], [1, 1, 3]):
        again = prompts([numbers[i] for i in order])
        assert torch.equal(again[0], x[order])
        assert torch.equal(again[1], y[order])
    x_fewer, y_fewer = prompts(numbers, n_points=5)
    assert torch.equal(x_fewer[:, :-1], x[:, :4])
    assert torch.equal(y_fewer[:, :-1], y[:, :4])
    x_other, y_other = prompts(numbers, query_noise=0.1)
    assert torch.equal(x_other[:, :-1], x[:, :-1])  # the noise changes the query alone
    assert torch.equal(y_other, y)
    first, second = (evaluation_prompts(TASK, start, count, 6, 9) for start, count in ((0, 4), (2, 2)))
    assert torch.equal(first[0][2:], second[0])
    assert not torch.equal(first[0], prompts(range(4))[0])


def test_nothing_is_read_back_to_the_host():
    """On the meta device there is nothing to read: any .item() or shape that depends on data raises."""
    examples = training_examples(SEED, torch.zeros((), dtype=torch.int64, device="meta"), 64, 1000, device="meta")
    x, y = sample_prompts(TASK, SEED, examples, 16, 33, dims=7)
    assert (x.shape, y.shape) == ((64, 33, 16), (64, 33))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(task="noisy_recal"), "did you mean 'noisy_recall'"),
        (dict(n_points=1), "at least 2 points, a pair and the query, got 1"),
        (dict(noise_std=0.5), "has its noise in the query, noise_std must be 0, got 0.5"),
        (dict(query_noise=-0.1), "query_noise must be at least 0, got -0.1"),
    ],
)
def test_bad_prompts(change, message):
    right = dict(task=TASK, seed=0, n_dims=4, n_points=8)
    with pytest.raises(BadInput, match=message):
        sample_prompts(examples=torch.arange(2), **right | change)


@cuda
def test_cuda_makes_the_same_prompts():
    for got, want in zip(prompts(torch.arange(9).cuda()), prompts(torch.arange(9)), strict=True):
        assert relative_error(got.cpu(), want.double()) < 1e-5


# --- tokens and layouts ---


def test_pairs_and_query():
    x, y = torch.arange(1.0, 7).view(1, 3, 2), torch.tensor([[20.0, 21, 22]])
    assert pairs_and_query(x, y).tolist() == [[[1, 2, 20, 1], [3, 4, 21, 1], [5, 6, 0, 0]]]
    assert not torch.equal(y[:, -1], torch.zeros(1)), "the target stays as it was"


def test_every_task_has_a_layout():
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5)
    assert LAYOUTS.keys() == TASKS.keys() | QUERY_TASKS.keys()
    for task, layout in LAYOUTS.items():
        tokens = layout.tokens(x, y)
        assert tokens.shape == (2, 5 * layout.per_point, 3 + layout.extra_inputs)
        assert tokens[:, layout.predicting].shape[1] == y[:, layout.predicted].shape[1] == layout.count(5)
        assert layout.count(5) == (1 if task in QUERY_TASKS else 5)


def test_the_stream_weighs_the_query_alone():
    constant, pool = Curriculum(6, 6, 0, 1, 9, 9, 0, 1), dict(seed=SEED, batch_size=4, pool_size=100)
    for full_points in (None, 9):
        stream = PromptStream(
            constant, pool, dict(task=TASK, n_dims=6), 40, full_points=full_points, predicted=slice(-1, None)
        )
        for step in (0, 3, 39):
            x, y, weight = stream.at(step)
            want = prompts(training_examples(step=step, **pool))
            assert torch.equal(x, want[0])
            assert torch.equal(y, want[1])
            assert weight.tolist() == [1]


# --- baselines ---


def test_baselines_read_like_their_definitions():
    B, points = 40, 9
    x, y = (t.double() for t in evaluation_prompts(TASK, 0, B, 6, points))
    similar = [[float(x[b, i] @ x[b, -1]) for i in range(points - 1)] for b in range(B)]

    def cost(predict):
        return sum((predict(similar[b], y[b, :-1].tolist()) - y[b, -1].item()) ** 2 for b in range(B)) / B

    def kernel(sharp):
        def predict(s, seen):
            weights = [math.exp(sharp * (v - max(s))) for v in s]
            return sum(w * v for w, v in zip(weights, seen, strict=True)) / sum(weights)

        return predict

    def averaging(factor):
        return lambda s, seen: factor * sum(a * b for a, b in zip(s, seen, strict=True))

    got = {name: error.item() for name, error in recall_errors(x, y).items()}
    assert got["zero"] == pytest.approx(cost(lambda s, seen: 0.0))
    assert got["nearest_neighbour"] == pytest.approx(cost(lambda s, seen: seen[s.index(max(s))]))
    assert got["softmax_kernel"] == pytest.approx(min(cost(kernel(sharp)) for sharp in SHARPNESS))
    costs = [cost(averaging(i / 1000)) for i in range(1000)]
    assert got["averaging"] <= min(costs) + 1e-12
    assert got["averaging"] == pytest.approx(min(costs), abs=1e-4)
    assert all(error.shape == (1,) and error.dtype == torch.float64 for error in recall_errors(x, y).values())


def test_baselines_at_the_demos_size():
    errors = {name: e.item() for name, e in recall_errors(*evaluation_prompts(TASK, 0, 4096, 16, 33)).items()}
    assert errors["zero"] == pytest.approx(1.0, abs=0.1)
    assert errors["averaging"] == pytest.approx(0.74, abs=0.05)
    assert errors["softmax_kernel"] < errors["nearest_neighbour"] < 0.03


# --- runs ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    train_ICL.main(argv(out_dir=out_dir))
    return out_dir


def test_the_lines_of_metrics(whole):
    lines = metrics(whole)
    assert [(m["step"], "eval/last" in m) for m in lines] == [
        (0, True), (2, False), (4, False), (4, True), (6, False), (6, True)
    ]  # fmt: skip
    for line in lines:
        if "eval/last" in line:
            assert line["eval_pointwise/loss"] == [line["eval/last"]]
            assert list(line["baselines"]) == ["nearest_neighbour", "softmax_kernel", "averaging", "zero"]
            assert all(len(errors) == 1 for errors in line["baselines"].values())
        else:
            assert (line["n_dims"], line["n_points"]) == (4, 6)
    assert lines[0]["eval/last"] == pytest.approx(lines[0]["baselines"]["zero"][0])  # the output starts at zero
    assert record(whole)["status"] == "finished"


def test_counters_equal_closed_forms(whole):
    """6 tokens of 4 + 2 numbers a prompt; the output is read off one of them."""
    L, D, B, T = 2, 16, 4, 6
    trunk = L * (12 * T * D * D + 2 * T * T * D)
    last = metrics(whole)[-1]
    assert last["tokens"] == 6 * B * T
    assert last["non_emb_compute"] == 6 * 6 * B * trunk
    assert last["compute"] == 6 * 6 * B * (trunk + T * (4 + 2) * D + D)


def test_prompts_have_their_full_size_from_the_start(tmp_path):
    train_ICL.main(argv(out_dir=tmp_path, max_iters=2, training_curriculum_adaptive_inc=True, n_dims=6))
    assert [(m["n_dims"], m["n_points"]) for m in metrics(tmp_path) if "n_dims" in m] == [(6, 6)]


def test_the_loss_is_that_of_the_query(tmp_path, monkeypatch):
    seen = []
    losses = train_ICL.losses

    def recorded(network, layout, x, y, weight):
        found = losses(network, layout, x, y, weight)
        tokens = torch.cat((x, y[..., None], torch.ones(*y.shape, 1)), 2)
        tokens[:, -1, -2:] = 0
        seen.append((found["overall_loss"].item(), (network(tokens)[:, 0] - y[:, -1]).square().mean().item()))
        return found

    monkeypatch.setattr(train_ICL, "losses", recorded)
    train_ICL.main(argv(out_dir=tmp_path, dropout=0.0))
    assert len(seen) == 6
    for got, want in seen:
        assert got == pytest.approx(want, rel=1e-5)


def test_a_resumed_run_is_the_whole_run(whole, tmp_path, monkeypatch):
    signal_at(monkeypatch, train_ICL, 2, 10)
    assert stops(train_ICL.main, argv(out_dir=tmp_path)) == 128 + 10
    train_ICL.main(argv(out_dir=tmp_path, init_from="auto"))
    assert_same_run(tmp_path, whole)


def test_the_step_of_a_cuda_graph(whole, tmp_path, monkeypatch):
    """The program that a graph records, called instead: the same weights."""
    monkeypatch.setattr(capture, "wanted", lambda *_: True)
    train_ICL.main(argv(out_dir=tmp_path))
    assert_equal(checkpoint(tmp_path)["model"], checkpoint(whole)["model"], "model")


def test_two_runs_in_a_process_are_as_they_are_alone(tmp_path):
    def plan(seed):
        cfg = configure(train_ICL.Settings, argv(out_dir=tmp_path / str(seed), seed=seed))
        return Plan(train_ICL.training, cfg)

    fit_together([plan(1), plan(2)], jobs=2)
    train_ICL.main(argv(out_dir=tmp_path / "alone", seed=2))
    assert_same_run(tmp_path / "2", tmp_path / "alone")
    assert record(tmp_path / "2")["together"] == 2


def test_the_evaluation_does_not_depend_on_its_batch(whole, tmp_path):
    train_ICL.main(argv(out_dir=tmp_path, eval_batch_size=3))
    for a, b in zip(metrics(whole), metrics(tmp_path), strict=True):
        if "eval/last" in a:
            assert a["eval/last"] == pytest.approx(b["eval/last"], rel=1e-5)
            assert a["baselines"] == b["baselines"]


def test_one_wide_head_learns_to_recall(tmp_path):
    """Two dimensions, three pairs: after 400 steps well below averaging, whose error two dimensions make large."""
    settings = dict(
        n_dims=2, n_positions=4, n_layer=1, d_model=32, n_head=1, batch_size=64, max_iters=400, eval_interval=400,
        eval_prompts=512, training_num_training_examples=32_000, dropout=0.0, task_query_noise=0.2,
        training_learning_rate=1e-3,
    )  # fmt: skip
    train_ICL.main(argv(settings, out_dir=tmp_path, log_interval=100))
    last = metrics(tmp_path)[-1]
    assert last["eval/last"] < 0.7 * last["baselines"]["averaging"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(n_positions=1), "at least 2 points"),
        (dict(noise_std=0.1), "noise_std must be 0"),
        (dict(task_query_noise=-1.0), "query_noise must be at least 0"),
        (dict(block_size=5), "block_size 5 does not hold 6 pairs, 6 tokens"),
        (dict(training_curriculum_dims_start=2), "no curriculum; leave training_curriculum_dims_start out"),
        (dict(training_curriculum_points_end=5), "no curriculum; leave training_curriculum_points_end out"),
    ],
)
def test_bad_settings(settings, message, tmp_path, capsys):
    assert stops(train_ICL.main, argv(settings, out_dir=tmp_path / "run")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_there_is_no_error_by_number_of_examples(whole, tmp_path, capsys):
    assert stops(icl_examples.main, [str(whole), f"--out={tmp_path / 'a.png'}"]) == 2
    assert "noisy_recall is measured at its query alone" in capsys.readouterr().err


def test_it_has_no_shifts(whole, capsys):
    assert stops(evaluate_ICL.main, [f"--out_dir={whole}", "--device=cpu"]) == 2
    assert "noisy_recall has no shifts" in capsys.readouterr().err
