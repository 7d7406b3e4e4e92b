import hashlib
import http.server
import json
import threading
from typing import ClassVar

import pytest
from huggingface_hub import constants

from flax_asr import errors
from flax_asr.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = ("README.md", "modeling_evil.py", "sub/config.json", "vocab.json", "config.json")


class _Hub(http.server.BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    status: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if name in self.status:
            code = {"GatedRepo": 403, "RepoNotFound": 404, "RevisionNotFound": 404}
            kind = self.status[name]
            return self.answer(b"", {"X-Error-Code": kind}, code.get(kind, 503))
        if path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.files.items()
            ]
            return self.answer(json.dumps(tree).encode())
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": n} for n in self.files]
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            return self.answer(json.dumps(info).encode())
        content = self.files[path.split("/", 5)[5]]
        return self.answer(
            content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        )

    def answer(self, content, headers=None, status=200):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_Hub, "files", {name: name.encode() for name in OTHERS})
    monkeypatch.setattr(_Hub, "status", {})
    monkeypatch.setattr(_Hub, "asked", [])
    yield _Hub
    server.shutdown()
    server.server_close()


def _downloaded(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            ["model.safetensors.index.json", "model-1-of-1.safetensors", "pytorch_model.bin"],
            ["model.safetensors.index.json", "model-1-of-1.safetensors"],
        ),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-1-of-1.bin", "tf_model.h5"],
            ["pytorch_model.bin.index.json", "pytorch_model-1-of-1.bin"],
        ),
        (["flax_model.msgpack", "tf_model.h5"], ["flax_model.msgpack"]),
    ],
)
def test_one_weight_format_and_no_code_is_downloaded(server, tmp_path, offered, taken):
    server.files |= {name: name.encode() for name in offered}
    folder, revision = hub.resolve("someone/model", cache_dir=tmp_path)
    assert revision == COMMIT
    assert _downloaded(folder) == {"config.json", "vocab.json", *taken}
    assert not any("evil" in path for path in server.asked)


def test_weights_come_only_where_they_are_wanted(server, tmp_path):
    server.files["model.safetensors"] = b"weights"
    folder, _ = hub.resolve("someone/model", cache_dir=tmp_path, with_weights=False)
    assert _downloaded(folder) == {"config.json", "vocab.json"}
    assert hub.resolve("someone/model", cache_dir=tmp_path)[0] == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_what_was_downloaded_once_is_found_without_the_hub(server, tmp_path):
    server.files["model.safetensors"] = b"weights"
    first = hub.resolve("someone/model", cache_dir=tmp_path)
    asked = len(server.asked)
    assert hub.resolve("someone/model", cache_dir=tmp_path, local_files_only=True) == first
    assert len(server.asked) == asked
    server.status["someone/model"] = "down"
    assert hub.resolve("someone/model", cache_dir=tmp_path) == first


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("GatedRepo", r"is gated: accept its terms at https://huggingface\.co/someone/model"),
        ("RepoNotFound", "neither a folder here nor a model on the Hugging Face hub"),
        ("RevisionNotFound", "has no revision 'v2'"),
        ("down", r"cannot be reached.*hf download someone/model"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_way_out(server, tmp_path, kind, match):
    server.status["someone/model"] = kind
    with pytest.raises(errors.ModelError, match=match):
        hub.resolve("someone/model", revision="v2", cache_dir=tmp_path)


def test_offline_without_a_copy_says_how_to_get_one(tmp_path):
    with pytest.raises(errors.ModelError, match=r"cannot be reached.*hf download someone/model"):
        hub.resolve("someone/model", cache_dir=tmp_path)
    with pytest.raises(errors.ModelError, match="local files only"):
        hub.resolve("someone/model", cache_dir=tmp_path, local_files_only=True)


def test_folders_are_taken_as_they_are_and_wrong_ones_named(tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == (tmp_path, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert hub.resolve("here/model")[1] is None
    (tmp_path / "file.bin").write_text("")
    for name, match in {
        "file.bin": "is a file: give the folder",
        "/no/such": "no such folder",
        "./nothing": "no such folder",
        "~nobody-is-called-so/model": "no such folder",
        "a/b/c": "no such folder",
        "not an id!": "neither a folder here nor a hub id",
    }.items():
        with pytest.raises(errors.ModelError, match=match):
            hub.resolve(name, local_files_only=True)
