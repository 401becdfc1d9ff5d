"""Operation counts against loops over every synapse, and against what is known of the numbers in other ways."""

import dataclasses
import importlib
import itertools
import json
from collections import defaultdict

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from spiking_mlp_jax.analysis.activity.rates import rates as activity_rates
from spiking_mlp_jax.analysis.cost_plot import cost_figure
from spiking_mlp_jax.analysis.plots import write
from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.deploy import artifact
from spiking_mlp_jax.deploy.cost import FLOAT32, INT8, cost
from spiking_mlp_jax.deploy.fold import fold
from spiking_mlp_jax.deploy.quantize import quantize
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.topology import fan_out, neuron_counts
from tests.support.random_integer import random_images, random_integer_net
from tests.support.random_model import make_workdir, random_model, set_value, variables

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
TINY = dict(image_size=8, patch_size=2, dim=3, depths=(1, 2), time_steps=2)


def sparse_model(seed=0, **overrides):
    """A random network with a third of its weights zero."""
    model = random_model(seed, **{**TINY, **overrides})
    rng = np.random.default_rng(seed)
    for name, variable in variables(model).items():
        if name.endswith("kernel"):
            set_value(model, name, np.asarray(variable[...]) * (rng.random(variable.shape) > 0.3))
    return model


def spikes_of(model):
    """Every layer's spikes [B, T, H, W, C]."""
    from spiking_mlp_jax.models.pixels import normalize

    images = normalize(IMAGES, (0.0,), (1.0,))
    _, seen = model(images, observe=lambda name, x: x if name.endswith(".spikes") else None)
    return images, {name: np.asarray(x) for name, x in seen.items()}


class Loops:
    """Counts one synapse after the other. x [B, T, H, W, C]; a kernel's weights are given by a function."""

    def __init__(self):
        self.effective, self.dense = 0, 0

    def synapse(self, value, weight):
        self.dense += 1
        self.effective += bool(value != 0) and bool(weight != 0)

    def conv(self, x, kernel, stride, padding):
        size, _, channels, outs = kernel.shape
        batch, steps, high, wide, _ = x.shape
        rows = (high + 2 * padding - size) // stride + 1
        for b, t, r, s, i, j in itertools.product(*map(range, (batch, steps, rows, rows, size, size))):
            y, z = r * stride - padding + i, s * stride - padding + j
            if 0 <= y < high and 0 <= z < wide:
                for c, o in itertools.product(range(channels), range(outs)):
                    self.synapse(x[b, t, y, z, c], kernel[i, j, c, o])
        return self

    def along(self, x, matrix, axis):
        """matrix [out, in] along an axis of the grid."""
        x = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        for values, o in itertools.product(x, range(len(matrix))):
            for i, value in enumerate(values):
                self.synapse(value, matrix[o, i])
        return self

    def linear(self, x, matrix):
        """matrix [in, out] over the channels."""
        return self.along(x, matrix.T, -1)


def brute_force(model):
    """(effective, dense) of each layer over `IMAGES`, by loops over the trained network's own kernels."""
    c = model.config
    images, spikes = spikes_of(model)
    kernel = {name: np.asarray(v[...]) for name, v in variables(model).items() if name.endswith("kernel")}
    found = {"stage0.encode": Loops().conv(images[:, None], kernel["stages.0.encode.conv.kernel"], c.patch_size, 0)}
    x = np.zeros(0)
    for i in range(c.stages):
        name, path = f"stage{i}.encode", f"stages.{i}.encode"
        if i and c.encoding == "plain":
            found[name] = Loops().conv(x, kernel[f"{path}.conv.kernel"], 2, 0)
        elif i:
            cells = found[f"{name}.cells"] = Loops()
            for node in range(3):
                cells.conv(x, kernel[f"{path}.cells.{node}.kernel"], 2, 1)
            for edge in (1, 2):
                node = spikes[f"{name}.node{edge}.spikes"]
                found[f"{name}.edge{edge}"] = Loops().conv(node, kernel[f"{path}.edges.{edge - 1}.kernel"], 1, 1)
        x = spikes[f"{name}.spikes"]
        for j in range(c.depths[i]):
            name = f"stage{i}.block{j}"
            part = lambda where, i=i, j=j: kernel[f"stages.{i}.blocks.{where}.kernel"][j]  # noqa: E731
            a, b = (spikes[f"{name}.token.{axis}.spikes"] for axis in ("height", "width"))
            identity = x if c.encoding == "spe" else spikes[f"{name}.token.identity.spikes"]
            found[f"{name}.height"] = Loops().along(x, part("token.height"), 2)
            found[f"{name}.width"] = Loops().along(x, part("token.width"), 3)
            found[f"{name}.fuse"] = Loops().linear(np.concatenate([identity, a, b], -1), part("token.fuse"))
            found[f"{name}.expand"] = Loops().linear(spikes[f"{name}.token.spikes"], part("channel.expand"))
            found[f"{name}.project"] = Loops().linear(spikes[f"{name}.channel.hidden.spikes"], part("channel.project"))
            x = spikes[f"{name}.channel.spikes"]
    features = np.asarray(model.norm(x)).mean((2, 3))
    found["head"] = Loops().linear(features, kernel["head.kernel"])
    return {name: (loops.effective, loops.dense) for name, loops in found.items()}, x


VARIANTS = [("spe", "token"), ("plain", "channel"), ("spe", "channel"), ("plain", "token")]


@pytest.mark.parametrize(("encoding", "norm_features"), VARIANTS)
def test_counts_are_those_of_loops_over_every_synapse(encoding, norm_features):
    model = sparse_model(encoding=encoding, norm_features=norm_features)
    expected, last = brute_force(model)
    # Batches of two sizes: the second is filled up, and what fills it must not count.
    found = cost(model, [IMAGES[:2], IMAGES[2:]])
    weighted = {name: layer for name, layer in found.layers.items() if layer.weights}
    assert list(weighted) == list(expected)
    for name, (effective, dense) in expected.items():
        layer = found.layers[name]
        real = name in ("stage0.encode", "head")
        assert (layer.Effective_MACs if real else layer.Effective_ACs) * 3 == pytest.approx(effective, rel=1e-12), name
        assert (layer.Effective_ACs if real else layer.Effective_MACs) == 0, name
        assert layer.Dense * 3 == dense, name
    assert found.total.Effective_ACs == pytest.approx(sum(x.Effective_ACs for x in found.layers.values()))

    folded = cost(fold(model), [IMAGES])
    for name, (effective, dense) in expected.items():
        layer = folded.layers[name]
        if name != "head":
            assert layer.effective * 3 == pytest.approx(effective, rel=1e-12), name
        assert layer.Dense * 3 == dense
    # Its head reads how many tokens spiked, of which it skips none but zeros.
    reached = np.count_nonzero(np.asarray(fold(model).arrays["head"]["kernel"][0]), -1)
    assert folded.layers["head"].effective * 3 == pytest.approx((reached * (last.sum((2, 3)) > 0)).sum())
    scaled = {name: layer.scale_MACs for name, layer in folded.layers.items() if layer.scale_MACs}
    if norm_features == "channel":
        assert not scaled
    else:
        assert scaled["stage0.block0.project"] == 2 * 16 * 3 and len(scaled) == 3


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["spe", "plain"])
def test_sparsity_and_footprint(encoding):
    model = sparse_model(encoding=encoding, neuron="plif" if encoding == "plain" else "lif")
    images, spikes = spikes_of(model)
    for net in (model, fold(model)):
        found = cost(net, [IMAGES])
        rates = activity_rates(model, images).layer
        by_spikes = dict(zip(neuron_counts(model.config), spikes, strict=True))
        assert list(by_spikes) == list(spikes)
        silent = sum(int((x == 0).sum()) for x in spikes.values()) / sum(x.size for x in spikes.values())
        assert found.total.activation_sparsity == pytest.approx(silent, abs=1e-12)
        assert found.layers["stage0.block0.fuse"].activation_sparsity == pytest.approx(
            1 - rates["stage0.block0.token.spikes"], abs=1e-6
        )
        name = "stage1.encode.edge2" if encoding == "spe" else "stage1.encode"
        assert found.layers[name].activation_sparsity == pytest.approx(1 - rates["stage1.encode.spikes"], abs=1e-6)
        assert found.layers["stage1.block1.project"].activation_sparsity == pytest.approx(
            1 - rates["stage1.block1.channel.spikes"], abs=1e-6
        )
    kernels = [np.asarray(v[...]) for name, v in variables(model).items() if name.endswith("kernel")]
    found = cost(model, [IMAGES])
    zeros = sum(int((x == 0).sum()) for x in kernels) / sum(x.size for x in kernels)
    assert found.total.connection_sparsity == pytest.approx(zeros)
    assert found.total.footprint == sum(v.nbytes for v in jax.tree.leaves(nnx.state(model)))
    assert all(layer.footprint for layer in found.layers.values())
    folded = fold(model)
    expected = sum(x.nbytes for x in jax.tree.leaves(folded.arrays))
    assert cost(folded, [IMAGES]).total.footprint == expected


@pytest.mark.parametrize("encoding", ["spe", "plain"])
def test_without_zero_weights_spikes_times_fan_out(encoding):
    """`synapses.fan_out` is a mean over a layer's neurons; without padding every neuron has that many."""
    model = random_model(encoding=encoding, image_size=16, patch_size=2, depths=(1, 2))
    images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)
    found = cost(model, [images])
    of, fans = {}, fan_out(model.config)
    rates = activity_rates(model, images.astype(np.float32) / 255).layer
    counts = neuron_counts(model.config)
    for name, rate in rates.items():
        of[name] = rate * counts[name] * model.config.time_steps
    # The head is counted by `fan_out` for every spike, here once a channel.
    of.pop("stage1.block1.channel.spikes")
    expected = sum(spikes * fans[name] for name, spikes in of.items())
    tail = found.layers["stage1.block1.project"].spikes
    assert tail == pytest.approx(rates["stage1.block1.channel.spikes"] * counts["stage1.block1.channel.spikes"] * 2)
    # At borders a spike reaches fewer: exact with plain encoding.
    assert found.total.Effective_ACs == pytest.approx(expected, rel=1e-6 if encoding == "plain" else 0.08)


@pytest.mark.slow
def test_integer_network_counts_its_own_spikes():
    small = dict(dim=3, patch_size=2, depths=(1, 1))
    for seed, (encoding, per_token) in enumerate([("spe", True), ("plain", False)]):
        net = random_integer_net(seed, encoding=encoding, per_token=per_token, step_kernels=per_token, **small)
        images = random_images(net, 2, seed)
        c, seen = net.description, defaultdict(list)
        net(images, lambda name, x, seen=seen: seen[name].append(np.asarray(x)))
        found = cost(net, [images])
        assert found.total.Effective_MACs == 0 and found.network == "integer"
        for name, parts in seen.items():
            kernel, layer = net.arrays[f"{name}.kernel"], found.layers[name]
            count = 0
            for x in parts:
                x = np.broadcast_to(x, (len(x), max(x.shape[1], len(kernel)), *x.shape[2:]))
                for t in range(x.shape[1]):
                    live = (x[:, t].reshape(-1, x.shape[-1]) != 0).astype(int)
                    count += int((live @ (kernel[min(t, len(kernel) - 1)] != 0)).sum())
            assert layer.Effective_ACs * 2 == count, (seed, name)
            assert layer.Effective_ACs <= layer.Dense
        tokens = c.stage_side(c.stages - 1) ** 2
        head = net.arrays["head.kernel"]
        assert found.layers["head"].Dense == c.time_steps * tokens * head[0].size
        stem = net.arrays["stage0.encode.kernel"]
        assert found.layers["stage0.encode"].Dense == 8 * len(stem) * c.stage_side(0) ** 2 * stem[0].size
        planes = 7 * len(stem) * c.stage_side(0) ** 2 * c.dim
        for layer in ("additions", "shifts"):
            assert getattr(found.layers["stage0.encode"], layer) == planes
        project = f"stage0.block0.project.{'signs' if c.per_token else 'kernel'}"
        if c.per_token:
            digits = net.arrays[project] != 0
            assert found.layers["stage0.block0.project"].additions == c.time_steps * c.dim * digits.sum()
        assert found.total.footprint == sum(x.nbytes for x in net.arrays.values())


def test_integer_stem_reads_the_bits_that_are_set():
    net = random_integer_net(3, in_channels=1, patch_size=1)
    side = net.description.image_size
    kernel = net.arrays["stage0.encode.kernel"]
    kernel[:] = 1
    images = np.full((1, side, side, 1), 0b10110, np.uint8)
    found = cost(net, [images]).layers["stage0.encode"]
    assert found.Effective_ACs == 3 * side * side * kernel.shape[-1] * len(kernel)


def test_time_steps_with_weights_of_their_own():
    """TEBN: folded, each step has its stem; in the trained network the stem runs once."""
    model = sparse_model(norm="tebn")
    trained, folded = cost(model, [IMAGES]), cost(fold(model), [IMAGES])
    assert folded.layers["stage0.encode"].Dense == 2 * trained.layers["stage0.encode"].Dense
    assert folded.layers["stage0.block0.fuse"].effective == trained.layers["stage0.block0.fuse"].effective


def test_macs_or_acs_is_decided_by_the_inputs():
    model = sparse_model()
    bits = (IMAGES > 100).astype(np.float32)
    found = cost(model, [bits]).layers["stage0.encode"]
    assert found.Effective_MACs == 0 and found.Effective_ACs > 0
    bits[0, 0, 0] = 0.5
    assert cost(model, [bits]).layers["stage0.encode"].Effective_ACs == 0


def test_energy():
    model = sparse_model()
    found = cost(fold(model), [IMAGES])
    energy = found.energy()
    total, steps = found.total, 2
    assert list(energy) == ["this network", "dense, 2 steps", "ANN, one pass"]
    here, dense, ann = energy.values()
    assert here.compute == pytest.approx(4.6 * (total.Effective_MACs + total.scale_MACs) + 0.9 * total.Effective_ACs)
    assert here.stem == pytest.approx(4.6 * found.layers["stage0.encode"].Effective_MACs)
    assert here.weights == pytest.approx(5 * total.effective)
    count = sum(neuron_counts(model.config).values())
    assert here.potentials == pytest.approx(2 * 5 * count * steps)
    # Without zero inputs: the stem once, all else at both steps.
    assert ann.compute == pytest.approx(4.6 * total.ann_MACs)
    stem = found.layers["stage0.encode"].ann_MACs
    assert dense.compute == pytest.approx(4.6 * (2 * total.ann_MACs - stem))
    assert dense.weights == pytest.approx(5 * (2 * total.ann_MACs - stem))
    assert ann.with_memory == pytest.approx(ann.compute + 5 * total.ann_MACs + 10 * count)
    assert here.head == pytest.approx(4.6 * found.layers["head"].Effective_MACs)
    free = dataclasses.replace(FLOAT32, memory_per_bit=0.0)
    assert found.energy(free)["this network"].with_memory == pytest.approx(here.compute)

    net = quantize(fold(model), IMAGES)
    integer = cost(net, [IMAGES])
    assert integer.constants is INT8 and integer.weight_bits == 8
    here = integer.energy()["this network"]
    total = integer.total
    assert here.compute == pytest.approx(0.03 * total.Effective_ACs + 0.1 * (total.additions + total.shifts))
    assert here.weights == pytest.approx(8 * 10 / 64 * total.Effective_ACs)
    words = {net.description.formats[name].word for name in ("stage0", "stage1")}
    assert words <= {16, 32} and total.potential_bits <= 32 * count


def test_no_images():
    model = sparse_model()
    for batches in ([], [IMAGES[:0]]):
        with pytest.raises(InputError, match="no images"):
            cost(model, batches)
    with pytest.raises(InputError, match="batches"):
        cost(model, [IMAGES[0]])
    with pytest.raises(InputError, match="images must be"):
        cost(model, [IMAGES[:, :4]])
    with pytest.raises(InputError, match="uint8"):
        cost(random_integer_net(0), [IMAGES.astype(np.float32)])


def test_text_json_and_picture(tmp_path):
    found = cost(sparse_model(encoding="plain"), [IMAGES])
    document = json.loads(json.dumps(found.to_dict()))
    assert set(document["total"]["SynapticOperations"]) == {"Effective_MACs", "Effective_ACs", "Dense"}
    assert document["layers"]["head"]["ActivationSparsity"] is None
    assert document["energy_pJ"]["ANN, one pass"]["compute"] == pytest.approx(4.6 * document["total"]["ann_MACs"])
    text = str(found)
    for name in found.layers:
        assert name in text
    assert found.table() in text and "45 nm" in text
    path = write(cost_figure(found), tmp_path / "new" / "cost.png")
    assert np.asarray(Image.open(path)).std() > 0


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)
    workdir = make_workdir(tmp_path / "run", random_model(depths=(1,)))
    plot = tmp_path / "cost.png"
    status, out, _ = run(capsys, "cost", workdir, "--limit", 5, "--batch-size", 3, "--json", "--plot", plot)
    document = json.loads(out)
    assert status == 0 and document["images"] == 5 and document["network"] == "trained" and plot.is_file()
    status, out, _ = run(capsys, "cost", workdir, "--folded")
    assert status == 0 and out.startswith("folded network, 12 images") and "scale" in out

    model, meta = weights.load(workdir / "weights")
    compiled = tmp_path / "net.smlp"
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)
    artifact.save(quantize(fold(model), images, data=meta["data"]), compiled)
    data = ("--data-dir", workdir / "data")
    status, out, _ = run(capsys, "cost", compiled, *data, "--limit", 2, "--plot", plot)
    assert status == 0 and out.startswith("integer network, 2 images") and out.rstrip().endswith(str(plot))
    status, _, err = run(capsys, "cost", compiled, "--folded")
    assert status == 2 and "--folded" in err
    status, _, err = run(capsys, "cost", workdir, "--plot", tmp_path)
    assert status == 2 and "cannot be written" in err


@pytest.mark.filterwarnings("ignore")
def test_neurobench_counts_the_same(x64):
    for name in ("torch", "spikingjelly", "neurobench"):
        pytest.importorskip(name, reason=f"{name} is only needed for benchmarks")
    check = importlib.import_module("benchmarks.neurobench_check")
    for encoding, norm_features in VARIANTS[:2]:
        model = sparse_model(encoding=encoding, norm_features=norm_features)
        images = IMAGES.astype(np.float64) / 255
        bad, known = check.differences(cost(model, [images]), check.neurobench_counts(model, images, batch=2))
        assert not bad and known
