"""Distribution shifts against their definitions, and evaluate_ICL.py from a checkpoint to its table."""

import itertools
import json

import pytest
import torch
from runs import TINY_ICL, flags, metrics

import evaluate_ICL
import train_ICL
from data.icl_regression.baselines import baseline_errors
from data.icl_regression.sampler import evaluation_prompts
from data.icl_regression.shifts import SHIFTS, shifted_prompts
from data.icl_regression.tasks import TASKS
from training.errors import BadInput

COUNT = 512


def prompts(shift, n_dims=6, seen=5, count=COUNT, task="linear_regression", **options):
    return shifted_prompts(shift, task, 0, count, n_dims, seen, **options)


def unshifted(n_dims=6, seen=5, count=COUNT, task="linear_regression", **options):
    return evaluation_prompts(task, 0, count, n_dims, seen + 1, **options)


@pytest.mark.parametrize(
    ("shift", "task"), sorted({*itertools.product(SHIFTS, TASKS)} - {("noisy_labels", "linear_classification")})
)
def test_prompts_do_not_depend_on_the_batch(shift, task):
    x, y = prompts(shift, task=task, count=32)
    parts = [shifted_prompts(shift, task, first, count, 6, 5) for first, count in ((0, 1), (1, 7), (8, 24))]
    assert torch.equal(x, torch.cat([part[0] for part in parts]))
    assert torch.equal(y, torch.cat([part[1] for part in parts]))
    assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.float32, torch.float32, (32, 6, 6), (32, 6))
    for longer, shorter in zip((x, y), prompts(shift, task=task, count=32, seen=3), strict=True):
        torch.testing.assert_close(longer[:, :3], shorter[:, :3], rtol=1e-6, atol=1e-6)  # the same examples, fewer


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_no_shift_is_the_evaluation_set(noise_std):
    for got, want in zip(prompts("none", noise_std=noise_std), unshifted(noise_std=noise_std), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shift", [name for name, shift in SHIFTS.items() if not shift.targets])
def test_targets_are_the_same_function_of_the_new_inputs(shift):
    """w, found from more unshifted points than dimensions, gives the shifted prompt's targets."""
    x, y = (t.double() for t in unshifted(seen=20))
    w = torch.linalg.lstsq(x, y[..., None]).solution
    x, y = (t.double() for t in prompts(shift))
    torch.testing.assert_close((x @ w).squeeze(-1), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_dims", "rank"), [(6, 3), (7, 3), (2, 1), (1, 1)])
def test_half_subspace_has_half_the_rank_and_the_same_length(n_dims, rank):
    x = prompts("half_subspace", n_dims, seen=3 * n_dims)[0].double()
    assert (torch.linalg.matrix_rank(x, rtol=1e-5) == rank).all()
    assert x.square().sum(2).mean().item() == pytest.approx(1, abs=0.05)
    covariance = (x.mT @ x).mean(0) / x.shape[1]
    torch.testing.assert_close(covariance * n_dims, torch.eye(n_dims).double(), rtol=0, atol=0.2)  # any direction


def test_skewed_covariance_has_its_spectrum_in_every_prompt():
    n, points = 5, 40_000
    x = prompts("skewed_covariance", n, seen=points - 1, count=3)[0].double()
    spectrum = torch.linalg.eigvalsh(x.mT @ x / points).flip(1)
    want = torch.tensor([1 / i**2 for i in range(1, n + 1)]).double()
    torch.testing.assert_close(spectrum, (want / want.sum()).expand(3, -1), rtol=0.03, atol=0)
    x = prompts("skewed_covariance", n, count=4000)[0].double()
    torch.testing.assert_close((x.mT @ x).mean(0) * n / 6, torch.eye(n).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize(("name", "factor"), [("scale_1/3", 1 / 3), ("scale_1/2", 0.5), ("scale_2", 2), ("scale_3", 3)])
def test_scaled_inputs_scale_targets(name, factor):
    for got, want in zip(prompts(name), unshifted(), strict=True):
        torch.testing.assert_close(got, factor * want)


def test_noisy_labels_have_noise_of_one_where_the_signal_has_n_dims():
    n = 6
    (x, y), (x0, y0) = prompts("noisy_labels", n, count=4000), unshifted(n, count=4000)
    assert torch.equal(x, x0)
    noise = y * (1 + 1 / n) ** 0.5 - y0
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.square().mean().item() * n == pytest.approx(1, rel=0.03)
    assert (noise * y0).mean().item() == pytest.approx(0, abs=0.01)
    assert y.square().mean().item() == pytest.approx(1, rel=0.03)


def test_orthants():
    x, x0 = prompts("orthants")[0], unshifted()[0]
    torch.testing.assert_close(x.abs(), x0.abs())
    signs, query = x[:, :-1].sign(), x[:, -1].sign()
    assert (signs == signs[:, :1]).all()
    assert torch.equal(x[:, -1], x0[:, -1])
    for share in ((signs[:, 0] > 0).float().mean(0), (signs[:, 0] == query).float().mean(0)):
        torch.testing.assert_close(share, torch.full((6,), 0.5), rtol=0, atol=0.1)


@pytest.mark.parametrize("seen", [0, 1, 5])
def test_orthogonal_query(seen):
    x, x0 = (t[0].double() for t in (prompts("orthogonal_query", seen=seen), unshifted(seen=seen)))
    assert torch.equal(x[:, :-1], x0[:, :-1])
    assert (x[:, :-1] @ x[:, -1:].mT).abs().sum() < 1e-6 * x.numel()
    torch.testing.assert_close(x[:, -1].norm(dim=1), x0[:, -1].norm(dim=1))


def test_repeated_query_is_any_of_the_examples():
    x, y = prompts("repeated_query", count=2000)
    same = (x[:, :-1] == x[:, -1:]).all(2)
    assert (same.sum(1) == 1).all()
    assert torch.equal(y[:, :-1][same], y[:, -1])
    torch.testing.assert_close(same.float().mean(0), torch.full((5,), 0.2), rtol=0, atol=0.04)
    assert torch.equal(prompts("repeated_query", seen=0)[0], unshifted(seen=0)[0])


def baselines(shift, n_dims, seen, count=2000):
    residuals = evaluate_ICL.baseline_residuals(*prompts(shift, n_dims, seen, count), 0.1)
    return {name: residual.square().mean().item() for name, residual in residuals.items()}


def test_baselines_under_shifts():
    """Least squares: solved by half the examples in half of the space, nothing learned about orthogonal directions."""
    assert baselines("half_subspace", 6, 2)["least_squares"] == pytest.approx(1 - 2 / 3, abs=0.03)
    for seen in (3, 5, 6, 11):
        assert baselines("half_subspace", 6, seen)["least_squares"] < 1e-8
    orthogonal = baselines("orthogonal_query", 6, 4)
    for name in ("least_squares", "ridge", "averaging"):
        assert orthogonal[name] == pytest.approx(orthogonal["zero"], rel=1e-5)
    assert baselines("repeated_query", 6, 4)["least_squares"] < 1e-8
    assert baselines("scale_3", 6, 2)["zero"] == pytest.approx(9 * baselines("none", 6, 2)["zero"], rel=1e-5)
    assert baselines("noisy_labels", 6, 40)["least_squares"] == pytest.approx((1 / 6) / (7 / 6) * 40 / 33, rel=0.1)


@pytest.mark.parametrize("seen", [0, 1, 4, 6, 9])
def test_baselines_of_the_query_are_those_of_training(seen):
    x, y = unshifted(seen=9, count=64)
    want = baseline_errors(x, y, 0.1)
    got = evaluate_ICL.baseline_residuals(x[:, : seen + 1], y[:, : seen + 1], 0.1)
    assert list(got) == list(want)
    for name, residual in got.items():
        assert residual.square().mean().item() == pytest.approx(want[name][seen].item(), rel=1e-6, abs=1e-9), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("icl") / "run"
    train_ICL.main(flags(TINY_ICL, out_dir=out_dir, dropout=0.2, noise_std=0.1, eval_prompts=24))
    return out_dir


def evaluated(run, tmp_path, **settings):
    out = tmp_path / "shifts.json"
    evaluate_ICL.main(flags(dict(out_dir=run, out=out, prompts=24, device="cpu"), settings))
    return json.loads(out.read_text())


def test_without_a_shift_the_errors_are_those_of_the_run(run, tmp_path, capsys):
    found = evaluated(run, tmp_path, shift="none", examples="|".join(map(str, range(8))))
    last = metrics(run)[-1]
    got = found["errors"]["none"]
    assert got["examples"] == list(range(8))
    assert got["model"] == pytest.approx(last["eval_pointwise/loss"], rel=1e-5)
    for name, errors in last["baselines"].items():
        assert got[name] == pytest.approx(errors, rel=1e-5, abs=1e-9)
    assert found["run"]["settings"]["n_dims"] == 4
    assert found["run"]["step"] == 6
    assert "after 6 steps: low_rank, linear_regression, n_dims 4; 24 prompts" in capsys.readouterr().out


def test_every_shift_has_its_rows_whatever_the_batch(run, tmp_path, capsys):
    whole = evaluated(run, tmp_path, prompts=12)["errors"]
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(SHIFTS))]
    assert rows == [
        [shift, str(seen)] for shift in SHIFTS for seen in ((1, 2, 3) if shift == "orthogonal_query" else (1, 2, 4, 7))
    ]
    parts = evaluated(run, tmp_path, prompts=12, batch_size=5)["errors"]
    assert whole.keys() == parts.keys() == SHIFTS.keys()
    for shift, errors in whole.items():
        for method, values in errors.items():
            assert parts[shift][method] == pytest.approx(values, rel=1e-5, abs=1e-9), (shift, method)


def test_labels_keep_out_of_noise(tmp_path):
    run = tmp_path / "run"
    train_ICL.main(flags(TINY_ICL, out_dir=run, max_iters=1, training_task="linear_classification"))
    assert evaluated(run, tmp_path)["errors"].keys() == SHIFTS.keys() - {"noisy_labels"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(shift="half_subspce"), "no shift 'half_subspce', did you mean 'half_subspace'?"),
        (dict(shift="all|none"), "no shift 'all'"),
        (dict(shift="orthogonal_query", examples="3|4"), "needs fewer examples than n_dims = 4, got 4"),
        (dict(shift="none", examples="8"), "8 examples and a query are more than the 8 pairs"),
        (dict(shift="none", examples="-1"), "at least 0 examples"),
        (dict(examples="a|b"), "write values with | between them"),
        (dict(out="/no/where/shifts.json"), "no folder /no/where"),
        (dict(out_dir="nowhere"), "no checkpoint nowhere/ckpt.pt"),
        (dict(prompts=0), "prompts is 0"),
        (dict(shfit="none"), "did you mean 'shift'?"),
    ],
)
def test_bad_input(settings, words, run, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate_ICL.main(flags(dict(out_dir=run, device="cpu"), settings))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_checkpoint_of_another_script(tmp_path, capsys):
    torch.save(dict(settings=dict(dataset="text"), step=1, model={}), tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit):
        evaluate_ICL.main([f"--out_dir={tmp_path}"])
    assert "is no run of train_ICL.py" in capsys.readouterr().err


def test_labels_are_refused_new_targets():
    with pytest.raises(BadInput, match="labels -1 and 1, noisy_labels would change them"):
        prompts("noisy_labels", task="linear_classification")
