"""`from_pretrained("user/repo")` through HF_ENDPOINT, against a server here that speaks the Hub's protocol."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.hub import save_pretrained
from spiking_mlp_jax.models import hub, weights
from tests.support.random_model import meta_for, random_model

ROOT = Path(__file__).parents[2]
ALLOWED = {"README.md", "SHA256SUMS", "config.json", "model.safetensors"}


class Hub(http.server.ThreadingHTTPServer):
    """Serves folders as repositories, {"me/net": {"main": (commit, folder)}}, and notes what is asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, tuple[str, Path]]] = {}
        self.asked: list[str] = []

    def add(self, repo, folder, revision="main"):
        commit = hashlib.sha1(f"{repo} {revision} {len(self.asked)}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[revision] = commit, folder


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        server = self.server
        assert isinstance(server, Hub)
        path = unquote(self.path.partition("?")[0]).strip("/")
        server.asked.append(f"{self.command} {path}")
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, kind, revision, *rest = parts[2:] if api else parts
        by_commit = {commit: (commit, folder) for commit, folder in server.repos.get(f"{owner}/{name}", {}).values()}
        found = (server.repos.get(f"{owner}/{name}", {}) | by_commit).get(revision)
        if found is None:
            missing = "RevisionNotFound" if f"{owner}/{name}" in server.repos else "RepoNotFound"
            return self.answer(404, X_Error_Code=missing)
        commit, folder = found
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        oids = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
        if api and kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            content = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": commit, "siblings": siblings}
            return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
        if api and kind == "tree":
            content = [{"type": "file", "path": f, "size": len(c), "oid": oids[f]} for f, c in files.items()]
            return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
        file = "/".join(rest)
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        self.answer(200, files[file], ETag=f'"{oids[file]}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def server():
    with Hub() as started:
        thread = threading.Thread(target=started.serve_forever, daemon=True)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture
def shared(tmp_path):
    model = random_model()
    save_pretrained(tmp_path / "net", model, {"data": meta_for(model)["data"]}, name="net", license="mit")
    # Whatever else a repository holds is not fetched.
    (tmp_path / "net" / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "net" / "extra.py").write_text("raise SystemExit")
    return tmp_path / "net"


STEPS = """
import json, sys
from pathlib import Path
import numpy as np
from spiking_mlp_jax import SpikingMLP
from spiking_mlp_jax.cli.main import main
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights

def said(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except InputError as error:
        return str(error)
    return "nothing"

images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
"""


def elsewhere(server, cache, steps, **environment):
    """What another process prints as JSON, and what it asked the server for."""
    before = len(server.asked)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    names = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http", "HTTP"))}
    names |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STEPS + steps], capture_output=True, text=True, env=names | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), server.asked[before:]


def test_download_once_then_offline(server, shared, tmp_path):
    server.add("me/net", shared)
    other = random_model(seed=3)
    save_pretrained(tmp_path / "other", other, {"data": meta_for(other)["data"]}, name="net", license="mit")
    server.add("me/net", tmp_path / "other", "v2")
    cache = tmp_path / "cache"
    # Not cached: the error names the command, and nothing is sent.
    steps = 'print(json.dumps(said(SpikingMLP.from_pretrained, "me/net")))'
    error, asked = elsewhere(server, cache, steps)
    assert "download it first: spiking-mlp download me/net" in error and not asked
    # Downloaded by the command, and in Python with a revision: data and text alone.
    steps = """
status = main(["download", "me/net"])
models = SpikingMLP.from_pretrained("me/net"), SpikingMLP.from_pretrained("me/net", revision="v2", download=True)
logits = [np.asarray(model(images)).tolist() for model in models]
folder = weights.find("me/net")
print(json.dumps([status, logits, str(folder), sorted(path.name for path in folder.iterdir())]))
"""
    (status, logits, folder, files), asked = elsewhere(server, cache, steps)
    assert status == 0 and set(files) == ALLOWED and Path(folder).is_relative_to(cache)
    fetched = {line.rpartition("/")[2] for line in asked if "/resolve/" in line}
    assert fetched == ALLOWED
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    for found, where in zip(logits, (shared, tmp_path / "other"), strict=True):
        np.testing.assert_array_equal(np.float32(found), weights.load(where)[0](images))
    # From now on without the network, for every command.
    steps = """
status = main(["convert", "me/net", "-o", "net.npz"])
pixels = SpikingMLP.from_pretrained("me/net").pixels.class_names
print(json.dumps([status, pixels, said(SpikingMLP.from_pretrained, "me/net", revision="v3")]))
"""
    (status, _, error), asked = elsewhere(server, cache, f"import os; os.chdir({str(tmp_path)!r})\n" + steps)
    assert status == 0 and (tmp_path / "net.npz").is_file() and not asked
    assert "spiking-mlp download me/net --revision v3" in error
    # A damaged cache is noticed, and `download` repairs it.
    blob = (Path(folder) / "config.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b'"tau": 2.0', b'"tau": 3.0'))
    steps = """
errors = [said(SpikingMLP.from_pretrained, "me/net")]
status = main(["download", "me/net"])
print(json.dumps([errors, status, said(SpikingMLP.from_pretrained, "me/net")]))
"""
    (errors, status, after), _ = elsewhere(server, cache, steps)
    assert "is not the file that SHA256SUMS lists" in errors[0] and (status, after) == (0, "nothing")


def test_what_cannot_be_downloaded(server, shared, tmp_path):
    bare, changed = tmp_path / "bare", tmp_path / "changed"
    bare.mkdir()
    (bare / "README.md").write_text("nothing here")
    shutil.copytree(shared, changed)
    (changed / "config.json").write_text((changed / "config.json").read_text().replace('"tau": 2.0', '"tau": 3.0'))
    server.add("me/bare", bare)
    server.add("me/changed", changed)
    server.add("me/fine", shared)
    steps = """
found = [said(SpikingMLP.from_pretrained, name, download=True) for name in ("me/none", "me/bare", "me/changed")]
found.append(said(SpikingMLP.from_pretrained, "me/fine", revision="v9", download=True))
print(json.dumps(found))
"""
    (none, empty, other, revision), _ = elsewhere(server, tmp_path / "cache", steps)
    assert "me/none cannot be downloaded (RepositoryNotFoundError" in none
    assert "me/bare on the Hub has no model.safetensors" in empty
    assert "config.json is not the file that SHA256SUMS lists" in other
    assert "me/fine cannot be downloaded (RevisionNotFoundError" in revision
    steps = 'print(json.dumps(said(SpikingMLP.from_pretrained, "me/fine", download=True)))'
    error, asked = elsewhere(server, tmp_path / "cache2", steps, HF_HUB_OFFLINE="1")
    assert "me/fine cannot be downloaded: http" in error and "cannot be reached" in error and not asked


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"needs huggingface_hub: pip install 'spiking-mlp-jax\[hub\]'"):
        SpikingMLP.from_pretrained("me/net", download=True)
    with pytest.raises(InputError, match="spiking-mlp download me/net"):
        SpikingMLP.from_pretrained("me/net")


def test_folders_and_shipped_names_come_first(shared, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "snapshot", never)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shared, tmp_path / "me" / "net")
    (tmp_path / "me" / "net" / "pytorch_model.bin").unlink()
    assert weights.find("me/net", download=True) == Path("me/net")
    assert weights.find("fashion_mnist", download=True) == weights.pretrained_path("fashion_mnist")
    for where in ("me/net", "fashion_mnist"):
        with pytest.raises(InputError, match="revision is for networks on the Hub"):
            weights.find(where, revision="v2")
