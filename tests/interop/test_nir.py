"""NIR graphs of folded networks: they run as the folded network does, and say what NIR says."""

import importlib.util
import re

import h5py
import jax
import nir
import numpy as np
import pytest

from benchmarks.nir_agreement import channels_first, compare, folded_spikes, image_batches, ours
from spiking_mlp_jax import ModelConfig
from spiking_mlp_jax.cli import main as cli
from spiking_mlp_jax.deploy.fold import FoldedNet, fold
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.nir.export import to_nir, write_nir
from spiking_mlp_jax.interop.nir.network import from_nir, read_nir
from spiking_mlp_jax.models import weights
from tests.deploy.test_fold import with_scales
from tests.support.random_model import random_model

VARIANTS = [
    dict(depths=(1, 1)),
    dict(encoding="plain", depths=(1, 1)),
    dict(norm_features="channel", norm="tdbn", depths=(1, 1)),
    dict(neuron="if", depths=(1,)),
    dict(neuron="plif", encoding="plain", depths=(1, 1)),
    dict(neuron="plif", tau_per_channel=True, decay_input=False, depths=(1,)),
    dict(decay_input=False, tau=3.0, depths=(1,)),
    dict(v_reset=-0.25, v_threshold=0.7, tau=1.25, depths=(1,)),
    dict(depths=(1, 1, 1), in_channels=3, time_steps=3),
    dict(depths=(1,), patch_size=1, image_size=4, dim=5),
]


def random_net(fields):
    net = fold(with_scales(random_model(seed=3, **fields), np.random.default_rng(0)))
    c = net.config
    images = jax.random.normal(jax.random.key(0), (3, c.image_size, c.image_size, c.in_channels), float)
    return net, images


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_graph_read_back_fires_as_the_folded_network_does(fields, x64, tmp_path):
    net, images = random_net(fields)
    expected, logits = jax.jit(lambda x: (folded_spikes(net, x), net(x)))(images)
    rates = [float(np.mean(spikes)) for spikes in expected.values()]
    assert 0.02 < np.mean(rates) < 0.98
    for form in ("rows", "dense"):
        write_nir(to_nir(net, form=form), tmp_path / "net.nir")
        back = from_nir(read_nir(tmp_path / "net.nir"))
        found, spikes = back.run(channels_first(images, back.input_shape))
        assert spikes.keys() == expected.keys()
        for name, values in spikes.items():
            assert (np.asarray(values).reshape(expected[name].shape) == (expected[name] > 0)).all(), name
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-9 * np.abs(logits).max())


def interpret(graph, x, time_steps):
    """A NIR graph by its published equations, node by node and step by step, with forward Euler; in NumPy.

    Returns the output of each step [T, B, ...] and the spikes of each node.
    """
    dt = float(graph.metadata["dt"])
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    neurons = {name: node for name, node in graph.nodes.items() if isinstance(node, nir.LIF | nir.IF)}
    v = {name: np.tile(node.v_reset, (len(x), *(1,) * node.v_reset.ndim)) for name, node in neurons.items()}
    outputs, seen = [], {name: [] for name in neurons}
    for _ in range(time_steps):
        values = {"input": x}

        def value(name, values=values):
            if name not in values:
                node = graph.nodes[name]
                current = sum(value(source) for source in sources[name])
                if name in neurons:
                    if isinstance(node, nir.LIF):
                        v[name] = v[name] + dt / node.tau * (node.v_leak - v[name] + node.r * current)
                    else:
                        v[name] = v[name] + dt * node.r * current
                    fired = v[name] > node.v_threshold
                    v[name] = np.where(fired, node.v_reset, v[name])
                    seen[name].append(fired)
                    current = fired.astype(float)
                elif isinstance(node, nir.Affine):
                    current = np.einsum("...oi,b...i->b...o", node.weight, current) + node.bias
                elif isinstance(node, nir.Conv2d):
                    current = correlate(current, node)
                elif isinstance(node, nir.Flatten):
                    current = current.reshape(len(current), -1)
                values[name] = current
            return values[name]

        outputs.append(value("output"))
    return np.stack(outputs), {name: np.stack(spikes, 1) for name, spikes in seen.items()}


def correlate(x, node):
    pad = [(0, 0), (0, 0), *((int(p),) * 2 for p in node.padding)]
    views = np.lib.stride_tricks.sliding_window_view(np.pad(x, pad), node.weight.shape[2:], (2, 3))
    views = views[:, :, :: int(node.stride[0]), :: int(node.stride[1])]
    return np.einsum("bcyxij,ocij->boyx", views, node.weight) + node.bias[:, None, None]


@pytest.mark.parametrize("fields", [dict(depths=(1, 1)), dict(neuron="if", encoding="plain", depths=(1, 1))], ids=str)
@pytest.mark.parametrize("form", ["rows", "dense"])
def test_an_interpreter_of_nirs_equations_agrees(fields, form, x64):
    net, images = random_net(fields)
    graph = to_nir(net, form=form, dt=0.002)
    x = channels_first(images, tuple(graph.nodes["input"].input_type["input"]))
    outputs, spikes = interpret(graph, x, net.config.time_steps)
    found, read = from_nir(graph).run(x)
    assert spikes.keys() == read.keys()
    for name, values in read.items():
        assert (np.asarray(values) == spikes[name]).all(), name
    np.testing.assert_allclose(found, outputs, rtol=0, atol=1e-9 * np.abs(outputs).max())


@pytest.fixture(scope="module")
def small():
    return fold(with_scales(random_model(seed=4, depths=(1, 1)), np.random.default_rng(0)))


@pytest.fixture(scope="module")
def shipped():
    return fold(weights.load(weights.find("fashion_mnist"))[0])


def test_a_trained_network_fires_alike_on_real_images(shipped):
    graph = to_nir(shipped)
    (batch,) = image_batches("fashion_mnist", None, 4, 4)
    shape = tuple(graph.nodes["input"].input_type["input"])
    found = compare(shipped, {"here": ours(graph, False)}, [batch], {"here": shape})["here"]
    # float32: the sums are the same but for their order.
    assert found["other"] <= 1e-4 * found["spikes"] and found["spikes"] > 10_000 and not found["classes"]


@pytest.mark.parametrize("form", ["rows", "dense"])
def test_every_parameter_has_the_neurons_full_shape(small, form):
    graph = to_nir(small, form=form)
    graph.check_types()
    side, channels = small.config.stage_side(0), small.config.dim
    expected = (channels * side, 1, side) if form == "rows" else (channels * side**2,)
    assert graph.nodes["stage0_block0_token"].v_threshold.shape == expected
    neurons = [node for node in graph.nodes.values() if isinstance(node, nir.LIF)]
    assert len(neurons) == len(folded_names(small))
    for node in neurons:
        shapes = {np.shape(getattr(node, key)) for key in ("tau", "r", "v_leak", "v_threshold", "v_reset")}
        assert shapes == {tuple(node.input_type["input"])}


def folded_names(net):
    image = (1, net.config.image_size, net.config.image_size, net.config.in_channels)
    return jax.eval_shape(lambda x: folded_spikes(net, x), jax.ShapeDtypeStruct(image, np.float32))


def test_v_reset_is_in_the_file(small, tmp_path):
    write_nir(to_nir(small), tmp_path / "net.nir")
    with h5py.File(tmp_path / "net.nir") as file:
        nodes = file["node/nodes"]
        neurons = [node for node in nodes.values() if node["type"][()] == b"LIF"]
        assert len(neurons) > 5 and all("v_reset" in node for node in neurons)


def test_sums_are_edges_and_a_norm_before_neurons_is_theirs(small):
    graph = to_nir(small)
    into = {a for a, b in graph.edges if b == "stage1_block0_channel"}
    fuse = {f"stage1_block0_fuse_{part}" for part in ("identity", "height", "width")}
    encode = {f"stage1_encode_{part}" for part in ("cells", "edge1", "edge2")}
    assert into == fuse | encode | {"stage1_block0_project_norm"}
    hidden = graph.nodes["stage1_block0_hidden"]
    assert (hidden.r < 0).any() and (hidden.r == 0).any() and np.unique(hidden.v_leak).size > 2
    assert np.unique(hidden.v_threshold).size == 1
    dense = to_nir(small, form="dense").nodes["stage1_block0_hidden"]
    assert (dense.r == 1).all() and (dense.v_leak == 0).all()


def test_dt_scales_tau_alone(small):
    slow, fast = (to_nir(small, dt=dt).nodes["stage0_encode"] for dt in (1e-3, 1e-4))
    np.testing.assert_allclose(slow.tau, 2e-3, rtol=1e-6)
    np.testing.assert_allclose(fast.tau, 2e-4, rtol=1e-6)
    assert (slow.r == fast.r).all()


def test_strict_differs_exactly_at_the_threshold():
    one = np.ones(1, np.float32)
    graph = nir.NIRGraph.from_list(nir.IF(r=one, v_threshold=2 * one, v_reset=0 * one))
    fires = [from_nir(graph, dt=1, time_steps=4, strict=strict).run(one[None])[0][:, 0, 0] for strict in (False, True)]
    np.testing.assert_array_equal(fires, [[0, 1, 0, 1], [0, 0, 1, 0]])


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        (dict(v_reset=None), {}, "soft reset"),
        (dict(norm="tebn"), {}, "differ between the 2 steps"),
        ({}, dict(dt=0.0), "positive number of seconds"),
        ({}, dict(dt=1e-45), "must be from 1e-30 to 1e"),
        ({}, dict(dt=1e300), "must be from 1e-30 to 1e"),
        ({}, dict(dt=float("nan")), "positive number of seconds"),
        ({}, dict(max_dense=-1), "positive number of megabytes"),
        ({}, dict(form="sparse"), "form must be rows or dense, got "),
    ],
)
def test_what_nir_cannot_say_is_refused(fields, options, said):
    net = fold(random_model(depths=(1,), **fields))
    with pytest.raises(InputError, match=said):
        to_nir(net, **options)


@pytest.mark.parametrize("form", ["rows", "dense"])
def test_a_graph_above_the_limit_is_refused_before_it_is_built(small, form):
    with pytest.raises(
        InputError, match=r"needs [\d,]+ numbers .*above the limit of 0.01 MB.*raise the limit to 1 MB .--max-dense"
    ) as refused:
        to_nir(small, form=form, max_dense=0.01)
    needed = int(re.search(r"needs ([\d,]+) numbers", str(refused.value))[1].replace(",", ""))
    nodes = to_nir(small, form=form).nodes.values()
    held = [
        x.size for node in nodes for x in vars(node).values() if isinstance(x, np.ndarray) and x.dtype == np.float32
    ]
    assert needed == sum(held)
    with pytest.raises(InputError, match="limit"):
        to_nir(fold_shapes("mlp_spe_t"), form=form)


def fold_shapes(variant):
    """A folded network of a variant's first stage with arrays of no memory, for limits alone."""
    config = ModelConfig.variant(variant, depths=(1,))
    side, dim = config.stage_side(0), config.dim
    shapes = {
        "encode": (48, dim), "block0.height": (side, side), "block0.width": (side, side), "block0.fuse": (3 * dim, dim),
        "block0.expand": (dim, 3 * dim), "block0.project": (3 * dim, dim),
    }  # fmt: skip
    shapes = {f"stage0.{name}": shape for name, shape in shapes.items()} | {"head": (dim, config.num_classes)}
    zeros = {
        name: {"kernel": np.broadcast_to(np.float32(0), (1, *shape)), "bias": np.zeros((1, shape[1]), np.float32)}
        for name, shape in shapes.items()
    }
    return FoldedNet(zeros, config, (0.0,) * 3, (1.0,) * 3)


def chain(*nodes):
    return nir.NIRGraph.from_list(*nodes)


def recurrent():
    one = np.ones(2, np.float32)
    nodes = {
        "input": nir.Input(np.array([2])),
        "lif": nir.LIF(one, one, one, one, one),
        "back": nir.Linear(np.ones((2, 2), np.float32)),
        "output": nir.Output(np.array([2])),
    }
    return nir.NIRGraph(nodes, [("input", "lif"), ("lif", "back"), ("back", "lif"), ("lif", "output")])


@pytest.mark.parametrize(
    ("graph", "options", "said"),
    [
        (recurrent, dict(dt=1, time_steps=1), "has a cycle"),
        (lambda: chain(nir.Scale(np.ones(2))), dict(dt=1, time_steps=1), "Scale node"),
        (lambda: chain(nir.Linear(np.ones((2, 2)))), dict(dt=1), "no time_steps: give it"),
        (lambda: chain(nir.Linear(np.ones((2, 2)))), dict(time_steps=1), "no dt: give it"),
        (lambda: chain(nir.Linear(np.ones((2, 2)))), dict(dt=1, time_steps=1.5), "positive whole number"),
        (lambda: chain(nir.Linear(np.full((2, 2), "a"))), dict(dt=1, time_steps=1), "must be numbers"),
        (lambda: nir.Linear(np.ones((2, 2))), dict(dt=1, time_steps=1), "expected a nir.NIRGraph"),
    ],
)
def test_graphs_that_cannot_run_here_are_refused(graph, options, said):
    with pytest.raises(InputError, match=said):
        from_nir(graph(), **options)


def test_damaged_and_foreign_files_are_refused(small, tmp_path):
    path = tmp_path / "net.nir"
    write_nir(to_nir(small), path)
    whole = path.read_bytes()
    for damaged in (b"", b"not HDF5", whole[: len(whole) // 2], whole[:100] + bytes(400) + whole[500:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not a readable NIR graph"):
            read_nir(path)
    with h5py.File(path, "w") as file:
        file["something"] = 1
    with pytest.raises(InputError, match="is not a readable NIR graph"):
        read_nir(path)
    nir.write(path, nir.Linear(np.ones((2, 2))))
    with pytest.raises(InputError, match="is not a readable NIR graph"):
        read_nir(path)
    for missing in (tmp_path, tmp_path / "none.nir"):
        with pytest.raises(InputError, match="is not a file"):
            read_nir(missing)


def test_images_of_another_shape_are_refused(small):
    net = from_nir(to_nir(small))
    with pytest.raises(InputError, match="must be"):
        net(np.zeros((1, 8, 8, 1), np.float32))
    with pytest.raises(InputError, match="floating"):
        net.run(np.zeros((1, *net.input_shape), np.uint8))


def test_the_command_writes_what_nir_reads(tmp_path, capsys):
    file = tmp_path / "net.nir"
    assert cli.main(["export-nir", "fashion_mnist", "-o", str(file), "--dt", "0.001"]) in (None, 0)
    assert "steps of 0.001 s" in capsys.readouterr().out
    graph = nir.read(file)
    assert float(graph.metadata["dt"]) == 0.001 and int(graph.metadata["time_steps"]) == 4
    for words in (
        ["fashion_mnist", "-o", str(tmp_path)],
        ["fashion_mnist", "-o", str(tmp_path / "no" / "net.nir")],
        ["fashion_mnist", "-o", str(file), "--dense", "--max-dense", "1"],
        ["no_such", "-o", str(file)],
        [str(tmp_path / "net.smlp"), "-o", str(file)],
    ):
        assert cli.main(["export-nir", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["net.nir"]


def test_a_missing_package_is_told(monkeypatch, tmp_path, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nir" else real(name, *rest))
    assert cli.main(["export-nir", "fashion_mnist", "-o", str(tmp_path / "net.nir")]) == 2
    assert "pip install 'spiking-mlp-jax[export]'" in capsys.readouterr().err


def test_images_of_another_layout_are_refused(small):
    network = from_nir(to_nir(small, dt=np.float32(1e-3)))
    c = small.config
    images = np.zeros((2, c.image_size, c.image_size, c.in_channels), np.float32)
    assert network(images).shape[1] == 2
    for wrong in (np.moveaxis(images, 3, 1), images.reshape(2, -1, 2 * c.image_size, c.in_channels)):
        with pytest.raises(InputError, match="channels last"):
            network(wrong)


def test_a_network_that_is_not_folded_is_refused():
    with pytest.raises(InputError, match="expected a FoldedNet, as `fold` returns it, got SpikingMLP"):
        to_nir(random_model(depths=(1,)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("command", ["export-nir", "export-onnx", "export-stablehlo"])
def test_no_export_takes_a_file_of_the_network(command, name, tmp_path, capsys):
    model = random_model(depths=(1,))
    weights.save(tmp_path, model, {})
    before = (tmp_path / name).read_bytes()
    assert cli.main([command, str(tmp_path), "-o", str(tmp_path / name)]) == 2
    assert "is part of a weights folder and would be overwritten" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("form", ["rows", "dense"])
def test_the_paper_s_networks_are_above_the_limit(form):
    block = fold(random_model(image_size=224, in_channels=3, patch_size=4, dim=78, depths=(1,), num_classes=1000))
    with pytest.raises(InputError, match=r"above the limit of 1,024 MB"):
        to_nir(block, form=form)
