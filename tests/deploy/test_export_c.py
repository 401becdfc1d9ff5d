"""Exported C: the reference's integers bit for bit, in strict C99, without a multiplication."""

import platform
import re
import shutil
import subprocess

import numpy as np
import pytest

from spiking_mlp_jax.deploy import reference
from spiking_mlp_jax.deploy.c.export import export_c, identifier, memory, to_c
from spiking_mlp_jax.deploy.network import IntegerNet
from spiking_mlp_jax.errors import InputError
from tests.support.random_integer import random_images, random_integer_net

STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
SHIPPED = dict(
    image_size=32,
    in_channels=1,
    num_classes=10,
    patch_size=4,
    dim=48,
    depths=(1, 2),
    expansion=3,
    encoding="spe",
    time_steps=4,
    per_token=True,
    neuron="lif",
    leak=1,
    decay_input=True,
    soft_reset=False,
    step_kernels=False,
)
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no C compiler called cc")


def cc(*arguments, folder):
    done = subprocess.run(["cc", *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def code_of(text):
    """The program without its comments."""
    return re.sub(r"//.*", "", text)


def write_all(nets, folder):
    """Each network's C file, and a program that prints the logits and the scores of three pictures of each."""
    lines = ["#include <stdint.h>", "#include <stdio.h>", "static int32_t scores[99];"]
    calls = []
    for i, net in enumerate(nets):
        export_c(net, folder / f"net{i}.c")
        c = net.description
        pixels = c.image_size**2 * c.in_channels
        t, k = c.time_steps, c.num_classes
        few = (t + 1) // 2
        lines += [
            f"void net{i}_logits(const uint8_t pixels[{pixels}], int32_t logits[{t}][{k}]);",
            f"void net{i}_run(const uint8_t pixels[{pixels}], uint32_t steps, int32_t logits[{t}][{k}]);",
            f"int net{i}_classify(const uint8_t pixels[{pixels}], int32_t scores[{k}]);",
            f"static void try{i}(void) {{ static uint8_t pixels[{pixels}]; static int32_t logits[{t}][{k}];",
            # Twice and with few steps between: nothing of an earlier picture may be left.
            "for (int n = 0; n < 3; n++) {",
            f"if (fread(pixels, 1, {pixels}, stdin) != {pixels}) return;",
            f"int best = net{i}_classify(pixels, scores);",
            f"net{i}_run(pixels, {few}, logits);",
            f'for (int t = 0; t < {few}; t++) for (int k = 0; k < {k}; k++) printf("%ld ", (long)logits[t][k]);',
            f"net{i}_logits(pixels, logits);",
            f'for (int t = 0; t < {t}; t++) for (int k = 0; k < {k}; k++) printf("%ld ", (long)logits[t][k]);',
            f'printf("%d", best); for (int k = 0; k < {k}; k++) printf(" %ld", (long)scores[k]); puts("");',
            "} }",
        ]
        calls.append(f"try{i}();")
    (folder / "driver.c").write_text("\n".join([*lines, f"int main(void) {{ {' '.join(calls)} return 0; }}"]))
    return [f"net{i}.c" for i in range(len(nets))]


def compare(nets, folder, *flags):
    """Compiles all in one go and compares with the reference."""
    files = write_all(nets, folder)
    cc(*STRICT, *flags, "driver.c", *files, "-o", "driver", folder=folder)
    images = [random_images(net, 3, seed) for seed, net in enumerate(nets)]
    given = b"".join(x.tobytes() for x in images)
    done = subprocess.run([folder / "driver"], input=given, capture_output=True, check=False)
    assert not done.returncode and not done.stderr, done.stderr.decode()
    lines = iter(done.stdout.decode().splitlines())
    for net, pictures in zip(nets, images, strict=True):
        logits = reference.run(net, pictures)
        few = reference.run(net, pictures, (net.description.time_steps + 1) // 2)
        for n in range(len(pictures)):
            scores = logits[:, n].sum(0)
            expected = [few[:, n], logits[:, n], scores.argmax(), scores]
            assert next(lines).split() == [str(x) for part in expected for x in np.ravel(part)]
    assert not list(lines)


@needs_cc
def test_bit_exact_with_the_reference(tmp_path):
    nets = [random_integer_net(seed) for seed in range(18)]
    for name in ("encoding", "per_token", "neuron", "decay_input", "soft_reset", "bits", "patch_size", "leak"):
        assert len({getattr(net.description, name) for net in nets}) > 1
    # Kernels for all steps, and for each.
    assert {len(net.arrays["head.kernel"]) for net in nets} >= {1, 4}
    assert any(net.description.neuron == "if" and net.description.soft_reset for net in nets)
    compare(nets, tmp_path, "-O2")


@needs_cc
def test_nothing_is_undefined(tmp_path):
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    flags = ["-g", "-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all"]
    if subprocess.run(["cc", *flags, "empty.c"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    compare([extreme(random_integer_net(seed)) for seed in range(24, 36)], tmp_path, *flags)


def extreme(net):
    """The network with a head at the ends of its word: the largest shifts and biases that it allows."""
    arrays = {name: x.copy() for name, x in net.arrays.items()}
    arrays["head.shift"].flat[0] = -31
    arrays["head.bias"].flat[0] = -(1 << 28)
    return IntegerNet(net.description, arrays)


@needs_cc
@pytest.mark.parametrize("bits", [8, 4])
def test_a_network_of_the_shipped_size(tmp_path, bits):
    net = random_integer_net(5, bits=bits, **SHIPPED)
    compare([net], tmp_path, "-O2")
    assert memory(net).constants < (270_000 if bits == 8 else 140_000)
    assert memory(net).ram < 33_000


@needs_cc
def test_needs_nothing_and_no_floating_point(tmp_path):
    files = write_all([random_integer_net(seed) for seed in range(5)], tmp_path)
    # Without the registers that floating point needs.
    general = ["-mgeneral-regs-only"]
    if subprocess.run(["cc", *general, "-c", files[0]], cwd=tmp_path, capture_output=True).returncode:
        general = []
    cc(*STRICT, *general, "-O2", "-c", *files, folder=tmp_path)
    for file in files:
        listed = subprocess.run(["nm", "-u", file.replace(".c", ".o")], cwd=tmp_path, capture_output=True, text=True)
        # A compiler may turn a loop into one of these, even without a library.
        assert set(re.findall(r"\bU (\w+)", listed.stdout)) <= {"memset", "memcpy", "memmove"}


@needs_cc
def test_memory_is_what_is_said(tmp_path):
    for seed in (0, 1, 2, 3):
        net = random_integer_net(seed)
        said = export_c(net, tmp_path / "net.c")
        assert said == memory(net)
        text = (tmp_path / "net.c").read_text()
        assert f"Bytes of constants: {said.constants}. Bytes of buffers: {said.ram}." in text
        cc("-O0", "-c", "net.c", folder=tmp_path)
        listed = subprocess.run(["nm", "-S", "net.o"], cwd=tmp_path, capture_output=True, text=True).stdout
        sizes = {kind: 0 for kind in "rbdt"}
        for size, kind in re.findall(r"^\w+ (\w+) (\w) \w+$", listed, re.M):
            sizes[kind.lower()] += int(size, 16)
        assert (sizes["r"], sizes["b"], sizes["d"]) == (said.constants, said.ram, 0)


# Products and quotients of numbers and of vectors, as x86-64 and AArch64 name them.
MULTIPLIES = re.compile(r"^\s+(\w*(?:mul|div|madd|msub|mla|mls)\w*\s.*)", re.M)


@needs_cc
def test_no_multiplication_is_compiled(tmp_path):
    """All of a file's assembly is looked through, addresses too: see each case for what it may hold."""

    def multiplications(file, *flags):
        return MULTIPLIES.findall(cc("-std=c99", *flags, "-S", file, "-o", "-", folder=tmp_path))

    (tmp_path / "planted.c").write_text("int f(int x, int y) { return x * y; }\n")
    assert multiplications("planted.c", "-O2")
    if "clang" in cc("--version", folder=tmp_path).lower():
        pytest.skip("what clang makes of the addresses has not been looked at")
    nets = [random_integer_net(seed) for seed in (0, 1, 2, 14)] + [random_integer_net(5, **SHIPPED)]
    for file in write_all(nets, tmp_path):
        # As it is written: none at all. Optimised: none, if offsets that grow are left to grow.
        assert not multiplications(file, "-O0")
        assert not multiplications(file, "-O2", "-fno-ivopts", "-fno-tree-scev-cprop")
        # By default GCC makes some of these offsets an index times a constant. Two numbers it never multiplies.
        if platform.machine() in ("x86_64", "AMD64"):
            assert all(re.match(r"imul[lq]?\s+\$-?\d+, ", found) for found in multiplications(file, "-O2"))


def test_the_text_is_readable_and_without_asterisks():
    for seed in range(30):
        text = to_c(random_integer_net(seed))
        code = code_of(text)
        assert "*" not in text and "?" + "?" not in text and "\\\n" not in text
        assert not re.search(r"\b(float|double|malloc|calloc|goto)\b|\d\.\d|[%/]=?\s*\w", re.sub(r'".*?"', "", code))
        assert re.findall(r"#.*", code) == [
            "#include <stdint.h>",
            "#ifdef SMLP_MAIN",
            "#include <stdio.h>",
            "#endif",
        ]
        assert text.isascii() and max(map(len, text.splitlines())) <= 120


@needs_cc
def test_its_own_main_and_an_odd_name(tmp_path):
    net = random_integer_net(3)
    file = tmp_path / "2 odd-n\u00e4mes .net.c"
    export_c(net, file)
    assert "void net_2_odd_n_mes_net_logits(" in file.read_text()
    cc(*STRICT, "-O1", "-DSMLP_MAIN", file.name, "-o", "program", folder=tmp_path)
    images = random_images(net, 2)
    done = subprocess.run([tmp_path / "program"], input=images.tobytes(), capture_output=True, check=True)
    scores = reference.run(net, images).sum(0)
    expected = [[row.argmax(), *row] for row in scores]
    assert [[int(n) for n in line.split()] for line in done.stdout.splitlines()] == expected
    for wrong in (b"", images.tobytes()[:-1], images.tobytes() + b"x"):
        done = subprocess.run([tmp_path / "program"], input=wrong, capture_output=True, check=False)
        assert done.returncode == 1 and b"error: expected images of" in done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net", "net"),
        ("Fashion-MNIST", "Fashion_MNIST"),
        ("2nd", "net_2nd"),
        ("_x", "net_x"),
        ("__a  b__", "net_a_b"),
        ("\u00e4", "net"),
        ("", "net"),
        ("*/ int x;", "net_int_x"),
        ("a" * 99, "a" * 40),
    ],
)
def test_names(name, expected):
    assert identifier(name) == expected


def test_scores_that_need_more_than_32_bits_are_refused(tmp_path):
    net = random_integer_net(0, time_steps=4)
    arrays = {**net.arrays, "head.bias": np.full_like(net.arrays["head.bias"], 1 << 30)}
    with pytest.raises(InputError, match="which 32 bits do not hold"):
        export_c(IntegerNet(net.description, arrays), tmp_path / "net.c")
    with pytest.raises(InputError, match="cannot be written"):
        export_c(net, tmp_path)
