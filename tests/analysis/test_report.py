"""The report's numbers against independent computations, and text from outside that must stay text."""

import base64
import html
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_mlp_jax.analysis.activity.stream import SPIKES
from spiking_mlp_jax.analysis.report import figures, measure, viewer
from spiking_mlp_jax.analysis.report.page import classes, environment, render, write_report
from spiking_mlp_jax.analysis.report.run import open_run
from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.deploy.cost import cost
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from tests.support.random_model import make_data, meta_for, random_model
from tests.support.report_run import NAMES, STEPS, Page, make_run, page_of, truth_of


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(workdir):
    return page_of(workdir)


@pytest.fixture(scope="module")
def truth(workdir):
    return truth_of(workdir)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Keeps compiled programs out of the user's cache."""
    monkeypatch.setattr("spiking_mlp_jax.utils.compilation_cache.use_compilation_cache", lambda where: None)


def row(seen, *start):
    """The only row of a table that begins with these cells."""
    (found,) = [cells for cells in seen.rows if tuple(cells[: len(start)]) == start]
    return found


def test_numbers_are_those_of_evaluation_json(workdir, page):
    stored = json.loads((workdir / "evaluation.json").read_text())
    seen = Page(page)
    assert seen.data["accuracy"] == stored["accuracy"]
    for k, accuracy in enumerate(stored["class_accuracy"]):
        assert seen.data[f"class-{k}"] == accuracy
    counts = [int(attributes["data-count"]) for tag, attributes in seen.tags if "data-count" in attributes]
    assert counts == np.ravel(stored["confusion"]).tolist()
    for name, rate in stored["firing_rates"].items():
        layer = name.removesuffix(SPIKES)
        found = [cells for cells in seen.rows if cells[0] == layer and len(cells) > 3 + STEPS - 1]
        assert float(found[0][2].split()[0]) == pytest.approx(rate, abs=1e-6)


@pytest.mark.slow
def test_the_same_again_is_the_same_page(workdir, page):
    assert page_of(workdir) == page


def test_steps_operations_and_mistakes_are_those_of_the_network(page, truth):
    logits, labels = truth.logits, truth.labels
    seen = Page(page)
    for t in range(STEPS):
        predicted = logits[: t + 1].mean(0).argmax(1)
        cells = row(seen, str(t + 1), str(seen.data[f"after-{t + 1}"]))
        assert seen.data[f"after-{t + 1}"] == np.mean(predicted == labels)
        assert cells[3] == figures.percent(np.mean(logits[t].argmax(1) == labels), 2)
        assert cells[4] == figures.percent(np.mean(predicted == logits.mean(0).argmax(1)), 2)
    assert seen.data["operations"] == pytest.approx(cost(truth.model, [truth.inputs]).total.effective)

    scores = np.asarray(jax.nn.softmax(logits.mean(0)))
    wrong = [i for i in np.argsort(-scores.max(1), kind="stable").tolist() if scores[i].argmax() != labels[i]]
    shown = [int(i) for i in re.findall(r"\(image (\d+)\)", seen.told)]
    assert shown == wrong[:12]
    alts = [attributes["alt"] for tag, attributes in seen.tags if tag == "img"]
    for i in shown:
        assert f"Test image {i}: {NAMES[labels[i]]}, taken for {NAMES[scores[i].argmax()]}" in alts


def test_names_stay_text(page):
    seen = Page(page)
    assert len(seen.scripts) == 2
    assert json.loads(seen.scripts[0])["classes"] == NAMES
    assert {tag for tag, _ in seen.tags} & {"b", "i", "u"} == {"i"}  # the bars
    assert not [1 for tag, attributes in seen.tags if tag == "i" and "style" not in attributes]
    assert not [1 for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    for name in NAMES:
        assert name in seen.told
    assert 'a <b> & "run"' in seen.told


def test_page_fetches_nothing_is_small_and_has_no_id_twice(page):
    seen = Page(page)
    assert len(page.encode()) < 3_000_000
    (policy,) = [a["content"] for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    for _, attributes in seen.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for tag, attributes in seen.tags if tag == "a"}
    assert targets <= set(ids)
    for tag, attributes in seen.tags:
        assert tag != "img" or attributes["alt"] or attributes["id"] == "shown"


def test_what_is_missing_is_named(capsys, workdir, tmp_path, monkeypatch):
    # The folder of the data is gone: the page describes the network alone, and its classes from evaluation.json.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workdir, "run")
    Path("run/config.json").write_text('{"data_dir": "gone"}')
    assert main(["report", "run"]) == 0
    assert capsys.readouterr() == ("run/report.html\n", "")
    stored = json.loads(Path("run/evaluation.json").read_text())
    seen = Page(Path("run/report.html").read_text(encoding="utf-8"))
    assert seen.data["accuracy"] == stored["accuracy"]
    assert seen.told.count("This needs the test images, which cannot be read: data_dir gone is not a folder") == 6
    assert json.loads(seen.scripts[0]) is None
    assert [1 for tag, attributes in seen.tags if attributes.get("alt", "").startswith("stage1.block0, along")]
    assert row(seen, "time_steps")[1] == str(STEPS)
    assert sorted(os.listdir("run")) == sorted([*os.listdir(workdir), "report.html"])

    # An evaluation of other weights is ignored; beside a weights folder alone there are no files of a run.
    Path("run/evaluation.json").write_text(json.dumps(stored | {"step": 10}))
    assert main(["report", "run"]) == 0
    first = Path("run/report.html").read_bytes()
    assert "accuracy" not in Page(first.decode()).data
    assert main(["report", "run"]) == 0
    assert Path("run/report.html").read_bytes() == first
    shutil.copytree("run/weights", "alone")
    assert main(["report", "alone", "-o", "page.html"]) == 0
    told = Page(Path("page.html").read_text(encoding="utf-8")).told
    assert 'dataset "folder" needs data_dir' in told
    for file in ("metrics.jsonl", "config.json", "versions.json"):
        assert f"No {file} of a training run lies beside the weights of alone" in told


def test_one_step_and_given_data(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "effective_fields", lambda run, progress: [])
    model = random_model(depths=(1,), time_steps=1)
    weights.save(tmp_path / "one", model, meta_for(model))
    data = make_data(tmp_path / "data")
    seen = Page(page_of(tmp_path / "one", dataset="folder", data_dir=str(data), limit=7))
    assert "trained for one time step" in seen.told
    assert "of 7 test images" in seen.told
    # Positions among all images, not among the chosen ones.
    positions = [int(i) for i in re.findall(r"\(image (\d+)\)", seen.told)]
    assert set(positions) <= set(np.linspace(0, 11, 7).round().astype(int).tolist())
    assert max(positions) > 6
    with pytest.raises(InputError, match="not a folder"):
        open_run(str(tmp_path / "one"), "folder", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="has 3 classes, but fashion_mnist has 10"):
        open_run(str(tmp_path / "one"), "fashion_mnist")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report"], "required: WORKDIR_OR_WEIGHTS"),
        (["report", "{tmp}/nothing"], "there is no folder"),
        (["report", "{run}", "-o", "{tmp}"], "cannot be written"),
        (["report", "{run}", "-o", "{tmp}/none/x.html"], "name a file in an existing folder"),
        (["report", "{run}", "--limit", "0"], "at least 1"),
        (["report", "{run}", "--dataset", "nonsense"], "nonsense"),
        (["report", "{broken}"], "evaluation.json is not readable JSON"),
        (["report", "{lines}"], "metrics.jsonl is corrupt"),
        (["report", "{bytes}"], "metrics.jsonl is corrupt"),
        (["report", "{shape}"], "has no valid accuracy and confusion matrix of 3 classes"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, workdir, tmp_path, arguments, message):
    model, meta = weights.load(workdir / "weights")
    weights.save(tmp_path / "broken" / "weights", model, meta)
    (tmp_path / "broken" / "evaluation.json").write_text("{")
    shutil.copytree(tmp_path / "broken", tmp_path / "shape")
    stored = json.loads((workdir / "evaluation.json").read_text())
    (tmp_path / "shape" / "evaluation.json").write_text(json.dumps(stored | {"confusion": stored["confusion"][1:]}))
    for name, content in {"lines": b'{"split": "train", "step": "x", "loss": "y"}\n', "bytes": b"\xff\xfe\x00"}.items():
        weights.save(tmp_path / name / "weights", model, meta)
        (tmp_path / name / "metrics.jsonl").write_bytes(content)
    places = {"run": workdir, "tmp": tmp_path}
    places |= {name: tmp_path / name for name in ("broken", "shape", "lines", "bytes")}
    arguments = [argument.format(**places) for argument in arguments]
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_report("x", tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_viewer_data_hold_every_spike(workdir, truth, monkeypatch):
    run = open_run(str(workdir))
    # Room for 300 bits per layer and image: the wider layers are stored as shares of channels.
    monkeypatch.setattr(viewer, "BUDGET", 300 // 8 * 4 * len(truth.spikes))
    found = viewer.examples(run, [], 4, lambda *_: None)
    assert [example.position for example in found] == [0, 4, 7, 11]
    document = viewer.viewer_data(run, found)
    assert {layer["channels"] for layer in document["layers"]} == {0, 4, 6, 12, 24}
    for example, stored in zip(found, document["examples"], strict=True):
        logits = truth.logits[:, example.position].ravel()
        np.testing.assert_allclose(unpack(stored["logits"], "<f4"), logits, rtol=1e-5, atol=1e-5)
        for layer, packed, name in zip(document["layers"], stored["spikes"], truth.spikes, strict=True):
            fired = truth.spikes[name][example.position]
            assert f"stage{layer['stage']}.{layer['name']}{SPIKES}" == name
            assert layer["side"] == fired.shape[2]
            values = unpack(packed, np.uint8)
            if layer["channels"]:
                assert layer["channels"] == fired.shape[3]
                np.testing.assert_array_equal(np.unpackbits(values)[: fired.size], fired.ravel())
            else:
                assert fired.size > 288
                np.testing.assert_allclose(values / 255, fired.mean(-1).ravel(), atol=1 / 255)


def unpack(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_many_layers_and_classes_are_thinned():
    names = [f"stage0.block{i}.{part}" for i in range(90) for part in ("token.height", "token", "channel")]
    shown = viewer.shown_layers(["stage0.encode", *names])
    assert len(shown) == viewer.LAYERS
    assert (shown[0], shown[-1]) == ("stage0.encode", "stage0.block89.channel")
    assert viewer.shown_layers(names[:30]) == names[:30]

    logits = np.zeros((2, 40), np.float32)
    logits[:, :20] = np.arange(20)
    example = viewer.Example(0, np.zeros((2, 2, 1), np.uint8), 30, logits, {})
    assert viewer.shown_classes(example) == [*range(19, 8, -1), 30]

    confusion = np.diag(np.arange(1, 61))
    confusion[7, 9] = 50
    seen = Page(render("classes.html", classes=classes(confusion, [f"c{i}" for i in range(60)])))
    assert [cells[0] for cells in seen.rows[1:21]] == ["c7", *(f"c{i}" for i in range(20) if i != 7)][:20]
    assert seen.rows[21][0] == "true class as another"
    assert [a["width"] for tag, a in seen.tags if tag == "img"] == ["60"]
    assert row(seen, "c7 as c9")[2:] == [figures.percent(50 / 58), "50"]


def test_figures_take_the_page_s_colours_and_are_the_same_each_time():
    svg = figures.svg(lambda: figures.accuracy_by_step([0.5, 0.8, 0.7]), "x", 'a "title"')
    assert svg == figures.svg(lambda: figures.accuracy_by_step([0.5, 0.8, 0.7]), "x", 'a "title"')
    assert "currentColor" in svg
    assert "var(--blue)" in svg
    assert not re.search("#010203|#0072b2|#ffffff|DejaVu|<\\?xml|metadata", svg, re.IGNORECASE)
    assert set(re.findall(r'id="(\w+)-', svg)) == {"x"}
    for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg):
        assert f'id="{"".join(target)}"' in svg
    assert svg.startswith('<svg role="img" aria-label="a &#34;title&#34;" viewBox=')
    for number in ("50.0", "80.0", "70.0"):
        assert number in svg


def test_signed_maps_show_the_page_where_values_are_small():
    pixels = figures.signed_map(np.array([[-2.0, 0.0], [1.0, 2.0]]))
    assert pixels[..., 3].tolist() == [[255, 0], [128, 255]]
    assert tuple(pixels[0, 0, :3]) == figures.NEGATIVE
    assert tuple(pixels[1, 1, :3]) == figures.POSITIVE
    assert not figures.signed_map(np.zeros((2, 2)))[..., 3].any()


@given(st.text())
def test_text_survives_html_and_json(given_text):
    escaped = environment().from_string("{{ text }}").render(text=given_text)
    assert not set(escaped) & set("<>\"'")
    assert html.unescape(escaped) == given_text
    encoded = environment().from_string("{{ document|tojson }}").render(document={given_text: [given_text]})
    assert not set(encoded) & set("<>&\u2028\u2029")
    assert json.loads(encoded) == {given_text: [given_text]}


def test_text_that_no_file_can_hold_becomes_question_marks():
    name = "a\udcff\0b"
    seen = Page(render("classes.html", classes=classes(np.eye(2), [name, "other"])))
    assert row(seen, "a??b", "")[2:] == ["1.0", "1"]


@pytest.mark.parametrize(
    "share, shown", [(0, "0.0 %"), (0.5, "50.0 %"), (0.001, "0.1 %"), (0.00012, "0.012 %"), (1, "100.0 %")]
)
def test_small_shares_keep_digits(share, shown):
    assert figures.percent(share) == shown.replace(" ", "\u00a0")
