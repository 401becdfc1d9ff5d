"""The documentation site is built strictly and offline, and holds together."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Whoever asks for another machine gets an error.
OFFLINE = """
import socket
def refuse(*arguments, **named): raise OSError("the site is built without network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


class Page(HTMLParser):
    """What a page refers to and what can be referred to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors, self.words = [], [], {""}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") != "canonical":
            self.loads.append(given["href"])

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    # The page for what is not there is shown under any address, so its links begin at the server's root.
    return {path: Page(path.read_text()) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_links_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            found = target.is_relative_to(site.resolve()) and target.is_file()
            if found and target.suffix == ".html":
                found = unquote(parts.fragment) in pages[target].anchors
            if not found:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site, pages):
    found = {link for page in pages.values() for link in page.loads if urlsplit(link).scheme not in ("", "data")}
    for path in site.rglob("*.css"):
        found |= set(re.findall(r"url\(\"?(https?:[^)\"]*)|@import[^;]*https?:", path.read_text()))
    assert not found


def test_no_page_names_a_place_of_this_machine(pages):
    for path, page in pages.items():
        text = "".join(page.words)
        for place in (str(ROOT), str(Path.home()) + "/", "/work/", "site-packages/"):
            assert place not in text, path


def test_every_module_and_notebook_has_its_page(site, pages):
    modules = [path for path in (ROOT / "spiking_mlp_jax").rglob("*.py") if path.read_text().strip()]
    for module in modules:
        relative = module.relative_to(ROOT / "spiking_mlp_jax").with_suffix(".html")
        if relative.parts[0] != "cli" and not module.stem.startswith("_"):
            assert (site / "reference" / relative).is_file(), relative
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = pages[site / "notebooks" / f"{notebook.stem}.html"]
        assert any(load.endswith(".png") for load in page.loads)
    lif = "".join(pages[site / "reference" / "nn" / "neuron.html"].words)
    assert "Leaky integrate-and-fire neurons." in lif and "Raises" in lif and "lif(jnp.full(7, 1.3))" in lif
    index = pages[site / "reference" / "index.html"]
    assert "nn/neuron.html#spiking_mlp_jax.nn.neuron.lif" in index.links
    assert "interop/official.html" in index.links
    compile_ = "".join(pages[site / "reference" / "commands.html"].words)
    assert "make an integer network without multiplications" in compile_
