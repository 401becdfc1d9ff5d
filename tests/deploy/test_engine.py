"""The compiled engine against the NumPy reference, bit for bit; its machine code; what it needs to run."""

import copy
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest

from spiking_mlp_jax.deploy import reference
from spiking_mlp_jax.deploy.engine import Engine, kernels
from spiking_mlp_jax.deploy.engine.compiled import COMPILED
from spiking_mlp_jax.deploy.engine.machine_code import check, check_kernels
from spiking_mlp_jax.errors import InputError
from tests.support.random_integer import random_images, random_integer_net
from tests.support.tiers import rest_slow

# Three images each: 2100 comparisons. ENGINE_NETS=20000 for more.
NETS = int(os.environ.get("ENGINE_NETS", "700"))
PARTS = 7
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("part", rest_slow(range(PARTS)))
def test_random_nets_are_bit_exact(part):
    for seed in range(part, NETS, PARTS):
        net = random_integer_net(seed)
        images = random_images(net, 3, seed)
        got = Engine(net, threads=1 + seed % 3).logits(images)
        want = reference.run(net, images)
        assert got.dtype == np.int32
        assert got.shape == want.shape
        assert np.array_equal(got, want), seed


@pytest.mark.parametrize("encoding", ["spe", "plain"])
@pytest.mark.parametrize("step_kernels", [False, True])
def test_several_widths_of_rows(encoding, step_kernels):
    # Wide enough for groups of 128, 64 and 32 channels, and for more than 256 rows in a sum.
    net = random_integer_net(
        3, encoding=encoding, dim=69, depths=(1, 1), image_size=8, patch_size=2, expansion=3, bits=8, num_classes=200,
        step_kernels=step_kernels,
    )  # fmt: skip
    images = random_images(net, 2)
    assert np.array_equal(Engine(net, threads=1).logits(images), reference.run(net, images))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("encoding", ["spe", "plain"])
def test_threads_and_batches(monkeypatch, threads, batch, encoding):
    # A team shares an image where there are fewer images than threads, here whatever the net's size.
    monkeypatch.setattr("spiking_mlp_jax.deploy.engine.engine.WORTH_A_TEAM", 0)
    net = random_integer_net(11, encoding=encoding, depths=(1, 2), image_size=24, patch_size=2)
    images = random_images(net, batch)
    engine = Engine(net, threads)
    want = reference.run(net, images)
    for _ in range(2):
        assert np.array_equal(engine.logits(images), want)
    assert np.array_equal(engine.predict(images), want.sum(0))
    assert np.array_equal(engine.predict_early(images, float("inf"))[0], want.sum(0))


def test_large_batches_in_parts():
    net = random_integer_net(4, depths=(1, 1), image_size=16, patch_size=2, dim=48, encoding="spe")
    images = random_images(net, 70)
    assert np.array_equal(Engine(net, 2).logits(images), reference.run(net, images))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, None])
def test_fewer_steps(steps):
    net = random_integer_net(8, time_steps=4)
    images = random_images(net, 3)
    want = reference.run(net, images, steps)
    engine = Engine(net, 2)
    assert np.array_equal(engine.logits(images, steps), want)
    assert np.array_equal(engine.predict(images, steps), want.sum(0))


@pytest.mark.parametrize("seed", range(24))
def test_early_exit(seed):
    net = random_integer_net(seed, time_steps=4, num_classes=[1, 2, 10][seed % 3])
    images = random_images(net, 5, seed)
    sums = reference.run(net, images).astype(np.int64).cumsum(0)
    engine = Engine(net, 1 + seed % 2)
    # Leads that occur, so that equality is met.
    lead = np.sort(sums, -1)[..., -1] - (np.sort(sums, -1)[..., -2] if sums.shape[-1] > 1 else 0)
    margins = [0, 0.1, float(lead[0, 0] * engine.score_scale) if lead[0, 0] > 0 else 1.0, 1e9, float("inf")]
    for margin in margins:
        for least in (1, 3):
            scores, steps = engine.predict_early(images, margin, min_steps=least)
            assert scores.dtype == steps.dtype == np.int32
            for i in range(5):
                want = next(
                    t for t in range(1, 5)
                    if t == 4 or (t >= least and (sums.shape[-1] == 1 or _leads(sums[t - 1, i], margin, t, engine)))
                )  # fmt: skip
                if sums.shape[-1] == 1 and margin == float("inf"):
                    want = 4
                assert steps[i] == want
                assert np.array_equal(scores[i], sums[want - 1, i])
        assert np.array_equal(engine.predict(images, margin=margin), engine.predict_early(images, margin)[0])


def _leads(sums, margin, t, engine):
    best = np.sort(sums)
    return (best[-1] - best[-2]) * engine.score_scale / t >= margin


def test_early_exit_within_fewer_steps():
    net = random_integer_net(5, time_steps=6, num_classes=10)
    images = random_images(net, 3)
    scores, steps = Engine(net).predict_early(images, 1e9, steps=2)
    assert steps.tolist() == [2, 2, 2]
    assert np.array_equal(scores, reference.run(net, images, 2).sum(0))


def test_wrong_input():
    net = random_integer_net(0)
    engine, images = Engine(net, 1), random_images(net, 1)
    last = net.description.time_steps
    for call in (
        lambda: engine.predict(images[0]),
        lambda: engine.predict(images[:0]),
        lambda: engine.logits(images.astype(np.float32)),
        lambda: engine.predict(images[:, :, :-1]),
        lambda: engine.predict(images, 0),
        lambda: engine.predict(images, last + 1),
        lambda: engine.predict(images, True),
        lambda: engine.predict(images, margin=-1.0),
        lambda: engine.predict(images, margin=float("nan")),
        lambda: engine.predict(images, margin="1"),
        lambda: engine.predict_early(images, 1.0, min_steps=0),
        lambda: engine.predict_early(images, 1.0, min_steps=last + 1),
        lambda: engine.predict([images[0], images[0][:2]]),
        lambda: Engine(None),  # pyright: ignore[reportArgumentType]
        lambda: Engine(net, 0),
        lambda: Engine(net, 1.5),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(InputError):
            call()


def test_numbers_of_numpy():
    net = random_integer_net(0)
    images, last = random_images(net, 3), np.int64(net.description.time_steps)
    engine, want = Engine(net, 1), reference.run(net, images)
    assert np.array_equal(Engine(net, np.int64(2)).logits(images, steps=last), want)  # pyright: ignore[reportArgumentType]
    for margin in (np.float32(0.5), np.int64(1)):
        scores, steps = engine.predict_early(images, margin, np.int8(1))  # pyright: ignore[reportArgumentType]
        expected = engine.predict_early(images, float(margin))
        assert np.array_equal(scores, expected[0]) and np.array_equal(steps, expected[1])


FORKED = """
import os, pickle, sys, warnings
import numpy as np
from spiking_mlp_jax.deploy.engine import Engine

warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
net, images = pickle.load(sys.stdin.buffer)
engine = Engine(net, 2)
want = engine.predict(images)
child = os.fork()
if not child:
    os._exit(0 if np.array_equal(engine.predict(images), want) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_threads_of_its_own():
    net = random_integer_net(2)
    done = subprocess.run(
        [sys.executable, "-c", FORKED], input=pickle.dumps((net, random_images(net, 40))), capture_output=True,
        check=False, cwd=TESTS.parent, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_unproven_words_are_refused():
    net = random_integer_net(0)
    net.arrays["stage0.encode.bias"][:] = np.iinfo(np.int32).max
    with pytest.raises(InputError, match="stage0"):
        Engine(net)


def test_read_only_and_strided_images():
    net = random_integer_net(1)
    images = random_images(net, 4)
    want = reference.run(net, images)
    frozen = images.copy()
    frozen.flags.writeable = False
    assert np.array_equal(Engine(net, 1).logits(frozen), want)
    assert np.array_equal(Engine(net, 1).logits(np.repeat(images, 2, 0)[::2]), want)


BLOCKED = """
import pickle, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain", "tensorflow_datasets",
                                  "tensorflow", "matplotlib", "PIL", "safetensors", "ml_collections", "absl"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from spiking_mlp_jax.deploy.engine import Engine
net, images = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(Engine(net, 2).logits(images)))
"""


def test_runs_with_numpy_and_numba_alone():
    net = random_integer_net(2)
    images = random_images(net, 2)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], input=pickle.dumps((net, images)), capture_output=True, check=False,
        cwd=TESTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert np.array_equal(pickle.loads(done.stdout), reference.run(net, images))


@pytest.mark.slow
def test_an_older_cpu_gives_the_same(tmp_path):
    # No AVX-512: other instructions, and another way to list spikes. A place for numba's cache that cannot be made.
    net = random_integer_net(2, per_token=False, depths=(1,))
    images = random_images(net, 2)
    blocker = tmp_path / "file"
    blocker.write_text("")
    environment = dict(
        os.environ, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(blocker / "cache")
    )
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], input=pickle.dumps((net, images)), capture_output=True, check=False,
        cwd=TESTS.parent, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert np.array_equal(pickle.loads(done.stdout), reference.run(net, images))


@pytest.mark.slow
def test_the_machine_code_does_not_multiply():
    report = check(Engine(random_integer_net(0), 1))
    assert report.ok, str(report)
    assert {row[0] for row in report.read} >= {"layer", "mix", "fire", "stem", "head"}
    # That it read the loops, and not some stub.
    assert all(looped > 50 and assembly > 100 for _, _, _, looped, assembly in report.read)
    assert "no multiplication" in str(report)


def planted_scalar(x, n):
    total = 0
    for i in range(n):
        total += x[i] * x[i]
    return total


def planted_float(x, n):
    total = 0.0
    for i in range(n):
        total += x[i] * 1.5
    return total


def planted_division(x, n):
    total = 0
    for i in range(n):
        total += x[i] // n
    return total


def planted_address(x, n):
    total = 0
    for i in range(n):
        for j in range(n):
            total += x[i * n + (j ^ i)]
    return total


def planted_call(x, n):
    total = 0.0
    for i in range(n):
        total += np.sin(x[i])
    return total


@pytest.mark.parametrize("function", [planted_scalar, planted_float, planted_division, planted_address, planted_call])
def test_planted_multiplications_are_found(function):
    compiled = numba.njit(**kernels.OPTIONS)(function)
    compiled(np.ones(16, np.int16), 4)
    report = check_kernels({"planted": compiled})
    assert not report.ok
    assert any(row.code == "llvm" for row in report.rows)
    if function is not planted_call:
        assert any(row.code == "assembly" for row in report.rows)
    assert "NOT" in str(report)


def test_a_multiplication_in_a_kernel_is_found():
    # In the neuron, which every kernel inlines.
    namespace = {**vars(kernels)}
    source = inspect.getsource(kernels.charge_and_fire.py_func)
    planted = source.replace("charged = add(v, x)", "charged = add(add(v, x), level * reset)")
    assert planted != source
    exec(planted + inspect.getsource(kernels.fire), namespace)
    net = random_integer_net(0)
    Engine(net, 1).predict(random_images(net, 1))
    compiled = numba.njit(**kernels.OPTIONS)(namespace["fire"])
    compiled.compile(COMPILED["fire"].signatures[0])
    report = check_kernels({"fire": compiled})
    assert {row.code for row in report.rows} == {"llvm", "assembly"}
    assert check_kernels({"fire": COMPILED["fire"]}).ok


def test_nothing_read_is_not_ok():
    assert not check_kernels({}).ok
    assert not check_kernels({"idle": numba.njit(planted_scalar)}).ok


def _summed(engine, images):
    return engine.predict(images)


def test_copies_and_other_processes():
    net = random_integer_net(5)
    images = random_images(net, 5)
    engine = Engine(net, threads=2)
    want = engine.predict(images)  # its threads run, its buffers are in use
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.threads == 2 and np.array_equal(other.predict(images), want)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert np.array_equal(pool.submit(_summed, engine, images).result(), want)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), EOFError(), pickle.UnpicklingError()])
def test_a_cache_that_fails_at_the_first_call(monkeypatch, error):
    net = random_integer_net(6, depths=(1,))
    images = random_images(net, 2)

    def fail(*arguments):
        raise error

    for name in COMPILED:
        monkeypatch.setitem(COMPILED, name, fail)
    assert np.array_equal(Engine(net, threads=1).logits(images), reference.run(net, images))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["damaged index", "damaged data", "full"])
def test_a_cache_on_a_bad_disk(tmp_path, kind):
    net = random_integer_net(2, per_token=False, depths=(1,))
    images = random_images(net, 2)
    environment = dict(os.environ, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    # No file can grow beyond 0 bytes: as on a full disk, writing fails after opening.
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    for turn in range(1 if kind == "full" else 2):
        done = subprocess.run(
            [sys.executable, "-c", limit * (kind == "full") + BLOCKED], input=pickle.dumps((net, images)),
            capture_output=True, check=False, cwd=TESTS.parent, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, (turn, done.stderr.decode())
        assert np.array_equal(pickle.loads(done.stdout), reference.run(net, images))
        files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
        assert kind == "full" or files
        for file in files:
            if file.suffix == (".nbi" if kind == "damaged index" else ".nbc"):
                file.write_bytes(b"")
