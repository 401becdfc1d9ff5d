"""Tables and figures of made-up results: their numbers equal NumPy's, and everything missing is mentioned."""

import csv
import io
import json

import numpy as np
import pytest

from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.sweep import plots, table
from spiking_mlp_jax.sweep.plan import load_sweep, shard
from spiking_mlp_jax.sweep.results import gather, result_file, write_result
from tests.sweep.test_plan import write_sweep

RUNS = {
    "t1": {"time_steps": 1},
    "base": {},
    "tebn": {"norm": "tebn"},
    "layer": {"norm": "layer"},
}


def planted(run):
    """A result whose numbers depend on the run, and can be found again."""
    rng = np.random.default_rng([run.seed, run.config.time_steps, sum(run.name.encode())])
    accuracy, steps = float(rng.uniform(0.6, 0.9)), (1, 2, 4)
    no_integer = 'norm="layer" cannot' if run.name == "layer" else None
    without = {"4": "no scale"} if run.name == "t1" else {}
    measured = dict(
        step=10, test_images=100, accuracy=accuracy, best_accuracy=accuracy + 0.01, best_step=5, parameters=1000,
        firing_rate=float(rng.uniform(0.1, 0.2)), synaptic_operations=float(rng.uniform(1e6, 2e6)),
        dense_operations=1e7, cost_images=50, not_integer=no_integer,
        integer_accuracy=None if no_integer else accuracy - 0.01,
        by_time_steps={str(t): None if str(t) in without else accuracy - 0.01 * t for t in steps},
        not_by_time_steps=without,
    )  # fmt: skip
    times = dict(float_ms=float(rng.uniform(1, 2)), float_batch_ms=0.5, batch=64, cores=2, load=0.5, processor="P")
    times |= {"integer_ms": None, "integer_batch_ms": None} if no_integer else {"integer_ms": 0.2}
    return {"status": "done", "measured": measured, "latency": times}


@pytest.fixture
def sweep(tmp_path):
    return load_sweep(write_sweep(tmp_path, runs=RUNS, seeds=(0, 1, 2), test_time_steps=(1, 2, 4)))


def lines_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_numbers_are_numpys(sweep, tmp_path):
    for run in sweep.runs:
        write_result(tmp_path, run, planted(run))
    found = gather(sweep, [tmp_path])
    rows = table.rows(sweep, found)
    assert [row.name for row in rows] == list(RUNS) and table.incomplete(rows) == []
    lines = lines_of(table.to_csv(sweep, rows))
    for row, line in zip(rows, lines, strict=True):
        results = [planted(run) for run in sweep.of(row.name)]
        for measure, (part, *_) in table.MEASURES.items():
            values = [x for x in (result[part].get(measure) for result in results) if x is not None]
            assert int(line[f"{measure}_n"]) == len(values)
            if values:
                expected = np.mean(values), np.std(values, ddof=1), np.min(values), np.max(values)
                numbers = [float(line[f"{measure}_{kind}"]) for kind in ("mean", "std", "min", "max")]
                np.testing.assert_allclose(numbers, expected, rtol=1e-12, atol=1e-15)
            else:
                assert line[f"{measure}_mean"] == ""
    single = lines_of(table.runs_csv(sweep, found))
    assert [float(line["accuracy"]) for line in single] == [planted(run)["measured"]["accuracy"] for run in sweep.runs]
    text = table.to_markdown(sweep, rows, found)
    values = [100 * planted(run)["measured"]["accuracy"] for run in sweep.of("base")]
    cell = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} ({min(values):.2f} to {max(values):.2f})"
    assert f"| base | 4 | batch | 3 | {cell} |" in text
    for words in (
        "n/a at int8 for layer",
        "n/a at T=4 for t1: no scale",
        "last epoch",
        "first 50 test images",
        "P, 2 c",
    ):
        assert words in text
    matrix = lines_of(table.matrix_csv(sweep, rows))
    assert len(matrix) == 4 * 3
    assert [line["why_not"] for line in matrix if line["mean"] == ""] == ["no scale"]
    expected = np.mean([planted(run)["measured"]["by_time_steps"]["2"] for run in sweep.of("tebn")])
    (line,) = [x for x in matrix if (x["run"], x["test_time_steps"]) == ("tebn", "2")]
    assert line["train_time_steps"] == "4" and float(line["mean"]) == pytest.approx(expected, rel=1e-12)


def test_missing_and_failed_runs_are_named(sweep, tmp_path, capsys):
    for run in sweep.runs:
        if run.name == "layer" and run.seed != 1:
            continue
        bad = (run.name, run.seed) == ("base", 2)
        write_result(tmp_path / "out", run, {"status": "failed", "error": "no | luck"} if bad else planted(run))
    arguments = ["sweep", str(tmp_path / "few.py"), "--workdir", str(tmp_path / "out"), "--collect"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "layer: no result of seeds 0 2" in text and "base, seed 2 failed: no | luck" in text
    folder = tmp_path / "out" / "tables" / "few"
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy.png",
        "accuracy_latency.png",
        "accuracy_operations.png",
        "accuracy_time_steps.png",
        "runs.csv",
        "table.csv",
        "table.md",
        "time_steps.csv",
        "time_steps.png",
    ]
    lines = {line["run"]: line for line in lines_of((folder / "table.csv").read_text())}
    assert (lines["base"]["seeds"], lines["base"]["failed"]) == ("2", "2")
    assert (lines["layer"]["seeds"], lines["layer"]["missing"], lines["layer"]["accuracy_std"]) == ("1", "0 2", "")
    status = {(x["run"], x["seed"]): x["status"] for x in lines_of((folder / "runs.csv").read_text())}
    assert len(status) == 12 and status["layer", "0"] == "missing" and status["base", "2"] == "failed"


def test_two_shards_make_the_whole_table(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "plot_sweep", lambda *_: [])
    for run in sweep.runs:
        write_result(tmp_path / "whole", run, planted(run))
    for i in (1, 2):
        for run in shard(sweep, i, 2):
            write_result(tmp_path / f"part{i}", run, planted(run))
    # What one shard failed at and another did counts as done.
    write_result(tmp_path / "part1", shard(sweep, 2, 2)[0], {"status": "failed", "error": "x"})
    file = str(tmp_path / "few.py")
    assert main(["sweep", file, "--workdir", str(tmp_path / "whole"), "--collect"]) == 0
    command = ["sweep", file, "--workdir", str(tmp_path / "part1"), "--collect", str(tmp_path / "part2")]
    assert main(command[:5]) == 1
    capsys.readouterr()
    assert main(command) == 0
    for name in ("table.md", "table.csv", "runs.csv", "time_steps.csv"):
        ours, theirs = (tmp_path / part / "tables" / "few" / name for part in ("part1", "whole"))
        assert ours.read_text() == theirs.read_text()


def drawn(axes):
    """Points of every line of markers, by marker size."""
    lines = [line for line in axes.get_lines() if line.get_marker() not in ("None", "")]
    means = [np.transpose(line.get_data()) for line in lines if line.get_markersize() > 5]
    seeds = [np.transpose(line.get_data()) for line in lines if line.get_markersize() < 5]
    return np.concatenate(means), np.concatenate(seeds)


def test_figures_show_every_seed_and_the_mean(sweep):
    found = {run.key: planted(run) for run in sweep.runs}
    rows = table.rows(sweep, found)
    figures = plots.accuracy_figure(sweep, rows), plots.operations_figure(sweep, rows)
    for figure, key in zip(figures, (None, "synaptic_operations"), strict=True):
        assert figure is not None
        means, seeds = drawn(figure.axes[0])
        for index, row in enumerate(rows):
            results = [planted(run)["measured"] for run in sweep.of(row.name)]
            ys = [100 * x["accuracy"] for x in results]
            xs = [index] * 3 if key is None else [x[key] / 1e6 for x in results]
            np.testing.assert_allclose(means[index], (np.mean(xs), np.mean(ys)), rtol=1e-9)
            np.testing.assert_allclose(seeds[3 * index : 3 * index + 3, 1], ys, rtol=1e-9)
            np.testing.assert_allclose(seeds[3 * index : 3 * index + 3, 0], xs, rtol=1e-9, atol=0.2)
    latency = plots.latency_figure(sweep, rows)
    assert latency is not None
    means, _ = drawn(latency.axes[0])
    np.testing.assert_allclose(means[0, 0], np.mean([found[f"t1/seed{s}"]["latency"]["float_ms"] for s in range(3)]))
    assert np.sum(np.isclose(means[:, 0], 0.2)) == 3  # compiled are all but "layer"
    matrix = plots.matrix_figure(sweep, rows)
    assert matrix is not None
    shown = [text.get_text() for text in matrix.axes[0].texts]
    assert len(shown) == 12 and shown.count("n/a") == 1
    values = [100 * planted(run)["measured"]["by_time_steps"]["2"] for run in sweep.of("base")]
    assert f"{np.mean(values):.2f}\n± {np.std(values, ddof=1):.2f}" in shown


def test_lines_over_a_field_of_numbers(tmp_path):
    runs = {f"{n}{t}": {"time_steps": t, "norm": n} for n in ("batch", "tebn") for t in (6, 1, 2)}
    sweep = load_sweep(write_sweep(tmp_path, runs=runs, x="time_steps", test_time_steps=(1, 2, 4)))
    rows = table.rows(sweep, {run.key: planted(run) for run in sweep.runs})
    figure = plots.accuracy_figure(sweep, rows)
    assert figure is not None
    axes = figure.axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 3 and line.get_marker() == "None"]
    np.testing.assert_allclose([line.get_xdata() for line in lines], [[1, 2, 6]] * 2, atol=0.1)
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["batch", "tebn"]


def test_one_seed_has_no_spread(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, runs=RUNS, seeds=(5,)))
    found = {run.key: planted(run) for run in sweep.runs}
    rows = table.rows(sweep, found)
    assert rows[0].measures["accuracy"].std is None
    assert f"| t1 | 1 | batch | 1 | {100 * rows[0].measures['accuracy'].mean:.2f} |" in table.to_markdown(
        sweep, rows, found
    )
    assert table.to_markdown(sweep, table.rows(sweep, {}), {}).count("no result of seed 5") == 4
    assert plots.accuracy_figure(sweep, table.rows(sweep, {})) is None


@pytest.mark.parametrize(
    "change",
    [
        {"measured": None},
        {"measured": {}},
        {"latency": None},
        {"seed": 7},
        {"config": "x"},
        {"measured": {"by_time_steps": {"1": "0.5"}, "not_by_time_steps": {}, "not_integer": None}},
        {"measured": {"by_time_steps": {}, "not_by_time_steps": {}, "not_integer": None, "accuracy": "0.5"}},
    ],
)
def test_damaged_results_are_refused_by_name(sweep, tmp_path, change):
    write_result(tmp_path, sweep.runs[0], planted(sweep.runs[0]))
    file = result_file(tmp_path, sweep.runs[0])
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=f"{file.name} is corrupt; delete it"):
        gather(sweep, [tmp_path])


def test_a_title_is_no_formula(tmp_path):
    odd = load_sweep(write_sweep(tmp_path, runs=RUNS, seeds=(0,), title="costs $\\frac{1$"))
    for run in odd.runs:
        write_result(tmp_path, run, planted(run))
    assert plots.plot_sweep(odd, table.rows(odd, gather(odd, [tmp_path])), tmp_path)
