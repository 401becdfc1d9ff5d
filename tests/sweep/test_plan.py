"""Sweep files: which runs they describe, how they are sharded, and one-line errors."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_dict

from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.sweep.plan import Run, Sweep, load_sweep, shard
from spiking_mlp_jax.sweep.results import differences, gather, run_folder, write_result
from spiking_mlp_jax.train.config import to_dict

ROOT = Path(__file__).parents[2]
DEMO = f"{ROOT}/configs/fashion_mnist.py:demo"


def write_sweep(folder, name="few.py", **found):
    """A sweep file that returns the given keys."""
    found = {"base": DEMO, "runs": {"t1": {"time_steps": 1}, "base": {}}, "seeds": (0, 3), **found}
    file = folder / name
    file.write_text(f"def get_sweep():\n    return {found!r}\n")
    return str(file)


def refused(file, *arguments, **options):
    with pytest.raises(InputError) as error:
        load_sweep(file, *arguments, **options)
    assert "\n" not in str(error.value) and Path(file).name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs" / "sweeps").glob("*.py")))
def test_shipped_sweeps_share_their_base(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(f"configs/sweeps/{name}")
    assert len(sweep.runs) == len(sweep.names) * len(sweep.seeds) and sweep.varied
    base = next(run for run in sweep.runs if run.name == "base")
    demo = load_sweep("configs/sweeps/time_steps.py").of("base")[0]
    assert to_dict(base.config) == to_dict(demo.config)


def test_expansion(tmp_path):
    file = write_sweep(
        tmp_path,
        runs={"a": {"time_steps": 1, "norm": "layer"}, "b": {"time_steps": 6}, "c": {"norm": "batch"}},
        common={"epochs": 2, "norm": "tebn"},
        title="Some",
    )
    sweep = load_sweep(file, ["--config.learning_rate=0.5", "--config.depths=(2,1)", "--noconfig.detach_reset"])
    assert [run.key for run in sweep.runs] == ["a/seed0", "b/seed0", "c/seed0", "a/seed3", "b/seed3", "c/seed3"]
    found = [(c.time_steps, c.norm, c.epochs, c.learning_rate, c.depths) for c in (r.config for r in sweep.runs[:3])]
    assert found == [(t, norm, 2, 0.5, (2, 1)) for t, norm in ((1, "layer"), (6, "tebn"), (4, "batch"))]
    assert [run.config.seed for run in sweep.runs] == [0, 0, 0, 3, 3, 3]
    assert all(run.config.detach_reset is False and run.config.dim == 24 for run in sweep.runs)
    assert sweep.varied == ("time_steps", "norm") and sweep.x is None and sweep.title == "Some"
    assert sweep.values == {"a": (1, "layer"), "b": (6, "tebn"), "c": (4, "batch")}
    assert sweep.test_time_steps == (1, 4, 6)
    again = load_sweep(file, ["--config.learning_rate=0.5", "--config.depths=(2,1)", "--noconfig.detach_reset"])
    assert [to_dict(run.config) for run in again.runs] == [to_dict(run.config) for run in sweep.runs]
    assert [run.seed for run in load_sweep(file, seeds=(7,)).runs] == [7, 7, 7]
    assert load_sweep(write_sweep(tmp_path)).x == "time_steps"


def test_a_config_dict_will_do(tmp_path):
    file = tmp_path / "few.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\ndef get_sweep():\n"
        f"    return ConfigDict({{'base': {DEMO!r}, 'runs': {{'a': {{'tau': 3}}, 'b': {{}}}}}})\n"
    )
    sweep = load_sweep(str(file))
    assert [run.config.tau for run in sweep.runs] == [3.0, 2.0] * 3 and sweep.x == "tau"


NAMES = st.integers(1, 7)


@given(names=NAMES, seeds=NAMES, count=st.integers(1, 12))
def test_shards_are_disjoint_complete_and_even(names, seeds, count):
    words = tuple(f"run{i}" for i in range(names))
    config = config_dict.ConfigDict()
    runs = tuple(Run(word, seed, config) for seed in range(seeds) for word in words)
    sweep = Sweep("s.py", "", words, tuple(range(seeds)), runs, (), {}, None, (1,))
    parts = [[run.key for run in shard(sweep, i + 1, count)] for i in range(count)]
    assert sorted(itertools.chain(*parts)) == sorted(run.key for run in runs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == [[run.key for run in shard(sweep, i + 1, count)] for i in range(count)]
    if names == count > 1 and seeds > 1:
        # No machine has one name alone, such as that of the largest network.
        assert all(len({key.split("/")[0] for key in part}) > 1 for part in parts)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"runs": {"a": {"time_stepz": 1}}}, ['run "a"', '"time_steps"']),
        ({"runs": {"a": {"time_steps": "four"}}}, ['run "a"', "time_steps must be a whole number", "'four'"]),
        ({"runs": {"a": {"time_steps": 0}}}, ['run "a"', "time_steps must be at least 1"]),
        ({"runs": {"a": {"norm": "bacth"}}}, ['run "a"', '"batch"']),
        ({"runs": {"a": {"tau": True}}}, ['run "a"', "tau"]),
        ({"runs": {"a": {"dim": 25}}}, ['run "a"', "24 or 27"]),
        ({"runs": {"a": {"seed": 1}}}, ['run "a"', "list the seeds"]),
        ({"runs": {"a": {"dry_run": True}}}, ['run "a"', "dry_run"]),
        ({"runs": {"a": 3}}, ['run "a"', "{field: value}"]),
        ({"runs": {"a/b": {}}}, ["a/b", "folder"]),
        ({"runs": {"a": {"tau": 3.0}, "A": {}}}, ["differ", "only in case"]),
        ({"runs": {"a": {}, "b": {"time_steps": 4}}}, ['"a" and "b"', "same experiment"]),
        ({"runs": {}}, ["must return runs"]),
        ({"base": None}, ["must return base"]),
        ({"base": "nowhere.py"}, ["nowhere.py"]),
        ({"common": {"epochz": 1}}, ["common", '"epochs"']),
        ({"seed": (1,)}, ['"seeds"']),
        ({"seeds": (0, 0)}, ["twice"]),
        ({"seeds": (-1,)}, ["seeds must list"]),
        ({"seeds": 3}, ["seeds must list"]),
        ({"test_time_steps": (0,)}, ["test_time_steps must list"]),
        ({"x": "norm"}, ["x must be", "time_steps"]),
        ({"title": 3}, ["title"]),
    ],
)
def test_mistakes_are_one_sentence(found, said, tmp_path):
    message = refused(write_sweep(tmp_path, **found))
    assert all(words in message for words in said), message


def test_mistakes_in_the_file_itself(tmp_path):
    assert "did you mean" in refused(write_sweep(tmp_path).replace("few", "fex"))
    file = tmp_path / "few.py"
    file.write_text("def get_sweep():\n    return 1 / 0\n")
    assert "line 2" in refused(str(file))
    file.write_text("get_sweep = lambda: [1]\n")
    assert "must return a dict" in refused(str(file))
    file.write_text("get_sweeps = 0\n")
    assert "defines no function get_sweep" in refused(str(file))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.time_steps=2", "varies"),
        ("--config.seed=2", "--seeds"),
        ("--config.epochs=two", "whole number"),
        ("--config.epochz=2", '"epochs"'),
        ("--config.epochs=0", "at least 1"),
    ],
)
def test_mistakes_in_overrides(override, said, tmp_path):
    assert said in refused(write_sweep(tmp_path), [override])


def test_the_command_line(capsys, tmp_path):
    file = write_sweep(tmp_path)
    common = ["sweep", file, "--workdir", str(tmp_path / "out")]
    assert main([*common, "--dry-run", "--config.epochs=2", "--seeds", "4", "--shard", "2/2"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "base/seed4" in out and "1 of 2 runs" in out and "t1/seed4" not in out
    assert not (tmp_path / "out").exists()
    assert main([*common, "--dry-run", "--config.time_steps=1"]) == 2
    assert capsys.readouterr().err.startswith("error: the sweep file")
    for wrong in (["--shard", "3/2"], ["--shard", "0/2"], ["--seeds", "a"], ["--workers", "0"], ["--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            main([*common, *wrong])
        assert ended.value.code == 2 and wrong[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "nothing", "--config.epochs=2"])
    assert "unrecognized arguments: --config.epochs=2" in capsys.readouterr().err
    assert main([*common, "--collect", str(tmp_path)]) == 2
    assert "has no folder results" in capsys.readouterr().err


# --- results of another configuration


def done(run):
    measured = {"by_time_steps": {}, "not_by_time_steps": {}, "not_integer": None}
    return {"status": "done", "measured": measured, "latency": {}, "config": to_dict(run.config)}


def test_stale_results_are_refused_by_name(tmp_path):
    sweep, changed = (load_sweep(write_sweep(tmp_path), [f"--config.epochs={n}"]) for n in (2, 3))
    out = tmp_path / "out"
    for run in sweep.runs:
        write_result(out, run, done(run))
    assert set(gather(sweep, [out])) == {run.key for run in sweep.runs}
    with pytest.raises(InputError, match=r"t1/seed0 \(epochs: 2 there, 3 now\).*few\.py describes|few\.py describes"):
        gather(changed, [out])
    with pytest.raises(InputError) as error:
        gather(changed, [out])
    for words in ("few.py", "t1/seed0 (epochs: 2 there, 3 now)", "base/seed3", "another --workdir"):
        assert words in str(error.value)
    assert not list(out.rglob("*.tmp"))


def test_what_may_differ_and_what_may_not(tmp_path):
    run = load_sweep(write_sweep(tmp_path)).runs[0]
    saved = to_dict(run.config)
    assert differences(saved, run) == []
    assert differences({**saved, "data_dir": "elsewhere", "log_every": 1, "workers": 3}, run) == []
    # A field that an older version did not have stands for its default.
    assert differences({k: v for k, v in saved.items() if k != "ema_decay"}, run) == []
    assert differences({**saved, "max_steps": 5}, run) == ["max_steps: 5 there, 0 now"]


def test_failed_and_unfinished_runs_of_another_configuration(tmp_path):
    sweep, changed = (load_sweep(write_sweep(tmp_path), [f"--config.epochs={n}"]) for n in (2, 3))
    out, run = tmp_path / "out", sweep.runs[0]
    write_result(out, run, {"status": "failed", "error": "for a reason"})
    assert gather(sweep, [out])[run.key]["error"] == "for a reason"
    assert gather(changed, [out]) == {}  # it is simply tried again
    # A training that had begun would be refused by the trainer: better at once.
    run_folder(out, run).mkdir(parents=True)
    (run_folder(out, run) / "config.json").write_text(json.dumps(to_dict(run.config)))
    with pytest.raises(InputError, match="epochs: 2 there, 3 now"):
        gather(changed, [out])
    (out / "results" / f"{run.key}.json").write_text("{")
    with pytest.raises(InputError, match=r"seed0\.json is not readable JSON"):
        gather(sweep, [out])
