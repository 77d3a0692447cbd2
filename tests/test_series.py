"""A series that nobody prepared: from a CSV or a data frame to a forecast, and what is said of one that cannot be."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from runs import TINY, begin, checkpoint, flags, stops
from runs import record as run_record

import forecast
import train_TS
from data.csv import prepare
from data.frames import season_of, tidy, write_frame
from data.series import SPLITS, load_series
from scripts import own_series
from training.errors import BadInput

TRAINING = ["--max_iters=3", "--eval_interval=3", "--init_lr=0.01", "--device=cpu"]
TINY_TS = dict(TINY, look_back=16, horizon=5, batch_size=8, dropout=0.0, mlr_rank_list="4|2|2")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def walks(rows, columns, seed=0):
    """Channels of very different sizes, with a period of 12."""
    rng, t = np.random.default_rng(seed), np.arange(rows)[:, None]
    noise = rng.standard_normal((rows, columns)).cumsum(0)
    return np.round((noise + 5 * np.sin(2 * np.pi * t / 12)) * 10.0 ** (np.arange(columns) % 5 - 1), 4)


def stamps(start, rows, frequency, form="%Y-%m-%d %H:%M:%S"):
    return list(pd.date_range(start, periods=rows, freq=frequency).strftime(form))


def text_of(header, times, values, separator=",", decimal=".", end="\n"):
    rows = [[*([time] if time else []), *map(str, row)] for time, row in zip(times, values, strict=True)]
    rows = [[field.replace(".", decimal) if i else field for i, field in enumerate(row)] for row in rows]
    return end.join(separator.join(row) for row in ([header] if header else []) + rows) + end


def days(rows=40, columns=2):
    return text_of(["day", *"abcdefgh"[:columns]], stamps("2020-01-30", rows, "D", "%Y-%m-%d"), walks(rows, columns))


# --- from a file to a forecast ---

NO_TIMES = [""] * 150
LAYOUTS = {  # name of the file: (text, values, the times after its end or the first row number, columns)
    "weather.csv": (
        text_of(["date", "p (mbar)", "T (degC)", "$_{"], stamps("2020-02-28 00:10", 280, "10min"), walks(280, 3)),
        walks(280, 3), stamps("2020-02-29 22:50", 500, "10min"), ["p (mbar)", "T (degC)", "$_{"],
    ),
    "monthly.csv": (
        text_of(["month", "sales"], stamps("2009-01-31", 133, "ME", "%Y-%m-%d"), walks(133, 1)),
        walks(133, 1), stamps("2020-02-29", 500, "ME", "%Y-%m-%d"), ["sales"],
    ),
    "exchange.csv": (text_of(None, NO_TIMES, walks(150, 8)), walks(150, 8), range(151, 600), list("12345678")),
    "german.csv.gz": (
        text_of(["Zeit", *(f"k{i}" for i in range(30))], stamps("2019-02-01", 120, "D", "%d.%m.%Y"), walks(120, 30),
                ";", ",", "\r\n"),
        walks(120, 30), stamps("2019-06-01", 500, "D", "%Y-%m-%d"), [f"k{i}" for i in range(30)],
    ),
}  # fmt: skip


def read(path):
    with open(path) as file:
        header, *rows = csv.reader(file)
    return header, [row[0] for row in rows], np.array([row[1:] for row in rows], float)


def by_hand(run, values, train_rows):
    """The forecast of a run's best weights for what follows values (rows, columns), in their units."""
    saved = checkpoint(run)
    settings = train_TS.Settings(**saved["settings"])
    model = settings.build(values.shape[1]).eval()
    model.load_state_dict(saved["best_model"])
    mean, std = values[:train_rows].mean(0), values[:train_rows].std(0)
    past = torch.tensor((values - mean) / std)[None, -settings.look_back :].float()
    with torch.no_grad():
        return model(past)[0].double().numpy() * std + mean


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_commands_from_a_csv_to_a_forecast(name, folder):
    """Stamps follow the last one, over leap days and month ends; values are those of the model on the last window."""
    text, values, times, columns = LAYOUTS[name]
    content = b"\xef\xbb\xbf" + text.encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    prepare.main(["--input", name, "--out", "./mine"])
    own_series.main(["--dataset=mine", "--data_dir=.", *TRAINING])
    header, found, got = read("out/ts_mine/forecast.csv")
    train = json.loads((folder / "mine/meta.json").read_text())["rows"]["train"]
    want = by_hand("out/ts_mine", values, train)
    assert train == int(0.7 * len(values))
    assert header[1:] == columns
    assert found == [str(time) for time in times[: len(want)]]
    size = np.abs(values).max(0)
    np.testing.assert_allclose(got / size, want / size, atol=1e-5)
    assert (folder / "out/ts_mine/forecast.png").read_bytes().startswith(b"\x89PNG")
    assert run_record("out/ts_mine")["settings"]["horizon"] == len(got)


@pytest.mark.parametrize("features", ["M", "S", "MS"])
@pytest.mark.parametrize("forecaster", ["encoder", "patch", "dlinear"])
def test_what_follows_newer_rows(features, forecaster, folder):
    """Data frames in and out: the newer rows decide, columns of other names do not; S and MS give the target alone."""
    values, index = walks(130, 3), pd.date_range("2020-01-01", periods=130, freq="h", name="time")
    frame = pd.DataFrame(values, index, ["a", "b", "c"])
    write_frame(frame[:100], "mine", splits="0.6|0.2|0.2")
    target = {} if features == "M" else dict(target="b")
    settings = dict(dataset="mine", data_dir=".", features=features, forecaster=forecaster, init_lr=0.01, **target)
    train_TS.main(flags(TINY_TS, settings, max_iters=3, out_dir="run"))
    newer = frame[60:].assign(note="x")
    got = forecast.forecast("run", newer)
    columns = ["a", "b", "c"] if features == "M" else ["b"]
    read_columns = [1] if features == "S" else [0, 1, 2]
    mean, std = values[:60].mean(0), values[:60].std(0)
    standardised = ((values - mean) / std)[:, read_columns]
    want = by_hand("run", np.concatenate([standardised[:60], standardised[114:130]]), 60)
    kept = slice(None) if features != "MS" else slice(1, 2)
    scale = slice(None) if features == "M" else slice(1, 2)
    assert list(got.columns) == columns
    assert got.index.equals(pd.date_range(index[-1], periods=6, freq="h", name="time")[1:])
    np.testing.assert_allclose(got, want[:, kept] * std[scale] + mean[scale], rtol=1e-4, atol=1e-4)

    as_column = newer.reset_index().iloc[:, ::-1]
    pd.testing.assert_frame_equal(forecast.forecast("run", as_column), got, check_freq=False)
    assert forecast.forecast("run").index[0] == index[100]
    with pytest.raises(BadInput, match=r"the data frame has 15 rows; run reads the last 16"):
        forecast.forecast("run", frame[:15])
    with pytest.raises(BadInput, match="has no column 'b'"):
        forecast.forecast("run", frame.drop(columns="b"))
    with pytest.raises(BadInput, match="a gap: 2020-01-02 00:00:00, where 2020-01-01 23:00:00 is due"):
        forecast.forecast("run", frame.drop(index=index[23]))


def test_naive_forecasts_stand_beside_it(folder):
    write_frame(pd.DataFrame(walks(100, 2), pd.date_range("2020-01-31", periods=100, freq="ME")), "mine")
    train_TS.main(flags(TINY_TS, dataset="mine", data_dir=".", forecaster="dlinear", max_iters=1, out_dir="run"))
    run = forecast.load_trained("run")
    past = forecast.known(run)
    np.testing.assert_allclose(past, walks(100, 2), rtol=1e-4)
    last, season = forecast.naive(run, past).items()
    assert (last[0], season[0]) == ("last row repeated", "last 12 rows repeated")
    np.testing.assert_allclose(last[1], past.to_numpy()[[99] * 5])
    np.testing.assert_allclose(season[1], past.to_numpy()[88:93])


# --- features ---


@pytest.mark.parametrize("forecaster", ["encoder", "patch", "dlinear"])
def test_ms_learns_and_counts_the_target_alone(forecaster, folder):
    """Its loss, gradients and errors are those of the target's column in float64; of the encoder, all are read."""
    write_frame(pd.DataFrame(walks(200, 3), columns=["a", "b", "c"]), "mine")
    base = dict(TINY_TS, dataset="mine", data_dir=".", forecaster=forecaster, out_dir="run")
    _, run = begin(train_TS, base, dict(features="MS", target="b"))
    torch.manual_seed(0)
    for p in run.model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    model, (past, future) = run.model.double().eval(), run.data.batch([30, 41, 50])
    assert future.shape == (3, 5, 1)
    past = past.double().requires_grad_()
    loss = train_TS.losses(model, past, future, run.data.predicted)["train/mse"]
    want = (model(past)[..., 1] - future[..., 0]).float().square().mean()
    assert torch.allclose(loss, want)
    moved = torch.autograd.grad(loss, past)[0].abs().sum((0, 1)) > 0
    assert moved.tolist() == [forecaster == "encoder", True, forecaster == "encoder"]
    series = load_series("mine")
    squared = []
    for row in run.data.first["test"]:
        x = torch.tensor(series.values[None, row - 16 : row]).double()
        squared.append((model(x)[0, :, 1].detach().numpy() - series.values[row : row + 5, 1]) ** 2)
    with torch.no_grad():
        assert run.data.errors(lambda x: model(x.double()), "test")[0] == pytest.approx(np.mean(squared), rel=1e-5)


# --- what a file may be ---


def read_frame(text, **how):
    prepare.main(["--input", *written(text), "--out", "./found", *(f"--{key}={value}" for key, value in how.items())])
    meta = json.loads(Path("found/meta.json").read_text())
    values = np.concatenate([np.fromfile(f"found/{split}.bin", "<f4") for split in SPLITS])
    return values.reshape(-1, len(meta["columns"])), meta


def written(text, name="mine.csv"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return [name]


HOURS = stamps("2020-01-31 20:00", 9, "h")


@pytest.mark.parametrize(
    ("times", "frequency", "end"),
    [
        (stamps("2020-02-01", 9, "D", "%d.%m.%Y"), "D", "2020-02-09 00:00:00"),
        (stamps("2020-02-01", 9, "D", "%d/%m/%Y"), "D", "2020-02-09 00:00:00"),  # 01/02 to 09/02, all months too
        (stamps("2020-02-01", 9, "h", "%d-%m-%Y %H:%M"), "h", "2020-02-01 08:00:00"),
        (stamps("2020-01-08", 9, "D", "%m/%d/%Y"), "D", "2020-01-16 00:00:00"),
        (stamps("2020-01-31 11:00", 9, "12h", "%m/%d/%Y %I:%M %p"), "12h", "2020-02-04 11:00:00"),
        (stamps("2020-01-01", 9, "MS", "%Y-%m"), "MS", "2020-09-01 00:00:00"),
        (stamps("2020-01-31", 9, "B", "%Y-%m-%d"), "B", "2020-02-12 00:00:00"),
        (stamps("2020-01-05", 9, "W", "%Y/%m/%d"), "W-SUN", "2020-03-01 00:00:00"),
        ([time[:10] if time.endswith("00:00:00") else time for time in HOURS], "h", "2020-02-01 04:00:00"),
        ([f"{time}+01:00" for time in HOURS], "h", "2020-02-01 03:00:00"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_times_as_people_write_them(times, frequency, end):
    for form in (lambda text: text, lambda text: text.encode("utf-16"), lambda text: text.replace(",", "\t")):
        values, meta = read_frame(form(text_of(["when", "x"], times, walks(9, 1))))
        assert (meta["time"], meta["frequency"], meta["end"], meta["columns"]) == ("when", frequency, end, ["x"])
        np.testing.assert_allclose(values, walks(9, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("frequency", "season"),
    [("10min", 144), ("15min", 96), ("h", 24), ("7h", 24), ("D", 7), ("B", 5), ("W-SUN", 52), ("ME", 12), ("QS", 4),
     ("YS", 1), ("s", 86400), ("", 1)],
)  # fmt: skip
def test_seasons(frequency, season):
    assert season_of(frequency) == season


def test_a_time_column_is_found_named_or_left_out():
    lines = [f"{1 + i / 8},{day},{2020 + i}" for i, day in enumerate(stamps("2020-01-30", 20, "D", "%Y-%m-%d"))]
    text = "\n".join(["x,day,year", *lines])
    for how, want in (
        ({}, ("day", "D", ["x", "year"])),
        (dict(time="day"), ("day", "D", ["x", "year"])),
        (dict(time="none"), ("", "", ["x", "year"])),
    ):
        meta = read_frame(text, **how)[1]
        assert (meta["time"], meta["frequency"], meta["columns"]) == want
    years = "\n".join(["year,x", *(f"{2000 + i},{i * i}" for i in range(20))])
    assert read_frame(years)[1]["columns"] == ["year", "x"]
    assert read_frame(years, time="year")[1]["frequency"] == "YS-JAN"


HOLES = "a,b\n1,\n2,10\n,20\n4,\n,40\n6,50\n"


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("interpolate", [[1, 10], [2, 10], [3, 20], [4, 30], [5, 40], [6, 50]]),
        ("zero", [[1, 0], [2, 10], [0, 20], [4, 0], [0, 40], [6, 50]]),
        ("drop", [[2, 10], [6, 50]]),
        ("forward", None),
    ],
)
def test_missing_values_by_a_rule(rule, want, capsys):
    frame = pd.read_csv(io.StringIO(HOLES))
    if want is None:
        with pytest.raises(BadInput, match="b is missing at 1, with nothing that --missing=forward"):
            tidy(frame, "f", missing=rule)
        frame.loc[0, "b"], want = 5, [[1, 5], [2, 10], [2, 20], [4, 20], [4, 40], [6, 50]]
    assert tidy(frame, "f", missing=rule).frame.to_numpy().tolist() == want


def test_gaps_are_filled_at_a_frequency_that_is_told(capsys):
    rows = days(12, 1).splitlines()
    text = "\n".join([*rows[:5], *rows[7:]])
    values, _ = read_frame(text, frequency="D", missing="forward")
    full, _ = read_frame(days(12, 1))
    assert np.array_equal(values, full[[0, 1, 2, 3, 3, 3, *range(6, 12)]])
    assert "missing: 0 values and 2 rows, forward" in capsys.readouterr().out
    dropped, meta = read_frame(text, frequency="D", missing="drop")
    assert np.array_equal(dropped, full[[0, 1, 2, 3, *range(6, 12)]])
    assert meta["end"] == "2020-02-10 00:00:00"


@pytest.mark.parametrize(
    ("splits", "rows"),
    [
        ("0.7|0.1|0.2", (28, 4, 8)),
        ("0.5|0.25|0.25", (20, 10, 10)),
        ("2020-02-09|2020-02-29", (10, 20, 10)),
        ("2020-02-08 12:00|2020-02-29", (10, 20, 10)),
    ],
)
def test_splits_by_share_or_by_date(splits, rows):
    values, meta = read_frame(days(), splits=splits)
    assert tuple(meta["rows"].values()) == rows
    np.testing.assert_allclose(meta["mean"], walks(40, 2)[: rows[0]].mean(0))
    assert len(values) == 40


def test_a_constant_column_is_kept():
    frame = pd.DataFrame(walks(40, 2), columns=["a", "b"]).assign(b=0.1)
    write_frame(frame, "mine")
    assert np.abs(load_series("mine").values[:, 1]).max() < 1e-6


# --- what cannot be ---


def changed(row, old, new, text=None):
    lines = (text or days()).splitlines()
    assert old in lines[row - 1]
    return "\n".join([*lines[: row - 1], lines[row - 1].replace(old, new, 1), *lines[row:]])


def without(*lines):
    return "\n".join(line for number, line in enumerate(days().splitlines(), 1) if number not in lines)


FIRST = days().splitlines()[6].split(",")  # line 7


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("", [], "mine.csv is empty"),
        (b"PAR1\x15", [], "mine.csv"),
        ("a,b\n", [], "mine.csv has 0 rows"),
        ("a,b\n1,2\n3,4\n", [], "mine.csv has 2 rows and 2 columns"),
        (b"a,b\n1,\xff\n", [], "mine.csv, line 2.*not UTF-8"),
        ("day\n2020-01-01\n2020-01-02\n2020-01-03\n", [], "3 rows and 0 columns that are not times"),
        ("a,,b\n1,2,3\n", [], "line 1: column 2 has no name"),
        ("a,b,a\n1,2,3\n4,5,6\n7,8,9\n", [], "two columns are called 'a'"),
        (changed(7, ",", ",1,"), [], "line 7: 4 columns instead of 3"),
        (without() + "\n\n1,2", [], "line 42: 0 columns instead of 3"),
        (changed(7, FIRST[2], "n/x"), [], "line 7: b is 'n/x', not a number"),
        (changed(7, FIRST[1], "inf"), [], "line 7: a is 'inf', not a number"),
        (changed(7, FIRST[1], "1e39"), [], "line 7: a is '1e\\+39', too large"),
        (changed(7, FIRST[2], "nan"), [], r"line 7: b is missing \(the only missing value\); --missing=forward\|"),
        (changed(7, FIRST[2], "", changed(9, "-", "-")).replace(FIRST[1], ""), [], r"line 7: a is missing \(2 missing"),
        (changed(7, FIRST[0], ""), [], "line 7: day is missing; every row needs its time"),
        (changed(7, FIRST[0], "soon"), [], "line 7: day is 'soon', not a time such as"),
        (without(7), [], "line 7: a gap: 2020-02-05 .*, where 2020-02-04 .* is due; --frequency=D and --missing"),
        (without(7), ["--frequency=D"], "line 7: a gap: "),
        (without(7), ["--missing=zero"], "line 7: a gap: "),
        (changed(7, "02-04", "02-03"), [], "line 7: 2020-02-03 .* after 2020-02-03 .*, a row twice or out of order"),
        (changed(7, "02-04", "01-01"), [], "line 7: 2020-01-01 .* after 2020-02-03 .*; .*--time=none"),
        (changed(7, "02-04", "02-04 01:00"), [], "line 7: 2020-02-04 01:00:00 is none of the times that are D apart"),
        (days(), ["--frequency=often"], "frequency is 'often'; pandas knows such as 10min"),
        (days(), ["--frequency=s"], "--frequency=s has more than 100 rows for each of the 40"),
        (days(), ["--time=hour"], "has no column 'hour' for --time, there are day, a, b"),
        (days(), ["--time=a"], "line 2: a is '.*', not a time such as"),
        (days(), ["--splits=0.7|0.1|0.1"], "splits is '0.7|0.1|0.1', three shares above 0 that add up to 1"),
        (days(), ["--splits=0.7|0.3"], "splits is '0.7|0.3'; give shares"),
        (days(), ["--splits=09.02.2020|29.02.2020"], "splits is '09.02.2020|29.02.2020'; give shares"),
        (days(), ["--splits=2020-02-29|2020-02-09"], "leaves train 30, val -20, test 30"),
        (days(), ["--splits=0.99|0.005|0.005"], "of the 40 rows, 2020-01-30 .* leaves train 39, val 1, test 0"),
        (days(), ["--splits=2020-02-09|2021-01-01"], "leaves train 10, val 30, test 0"),
        ("a\n1\n2\n3\n4\n", ["--splits=2020-02-09|2021-01-01"], "mine.csv has no times; give shares"),
        ("a\n1\n2\n3\n4\n", ["--frequency=D"], "mine.csv has no times; --frequency=D"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) and "\n" not in value else "",
)  # fmt: skip
def test_bad_files_are_one_line(text, argv, message, folder, capsys):
    written(text)
    assert stops(prepare.main, ["--input", "mine.csv", "--out", "./new", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert [path.name for path in folder.iterdir()] == ["mine.csv"]


def test_files_that_are_not_there(folder, capsys):
    assert stops(prepare.main, ["--input", "none.csv", "--out", "./new"]) == 2
    assert "none.csv" in capsys.readouterr().err
    written(gzip.compress(days().encode())[:-20], "cut.csv.gz")
    assert stops(prepare.main, ["--input", "cut.csv.gz", "--out", "./new"]) == 2
    assert "cut.csv.gz, after line" in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_settings_that_do_not_fit_a_series_are_one_line(folder, capsys):
    written(days())
    prepare.main(["--input", "mine.csv", "--out", "./mine"])
    base = flags(TINY_TS, dataset="mine", data_dir=".", out_dir="run")
    for more, message in (
        (["--look_back=30"], "the train part has 28 rows, too few for look_back 30 and horizon 5"),
        ([], "the val part has 4 rows, too few for horizon 5"),
        (["--features=S", "--target=c"], "target is 'c', the columns of ./mine are a, b"),
        (["--dataset=yours"], "make it with: python "),
    ):
        assert stops(train_TS.main, [*base, *more]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not (folder / "run").exists()
