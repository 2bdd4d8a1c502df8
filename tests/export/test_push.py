"""``qgalore export --push``: what the hub is sent, by its own client over HTTP, and what is refused before."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from qgalore.cli import export

TOKEN = "hf_" + "abcDEF0123" * 3


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that an upload of small files asks for. ``server.repos``: id → whether it is private."""

    def _answer(self, found, status=200, **headers):
        body = json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.removeprefix("/api/models/").split("?")[0]
        if self.path == "/api/whoami-v2" and self.headers["Authorization"] == f"Bearer {TOKEN}":
            self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": self.server.role}}})
        elif name in self.server.repos:
            self._answer({"id": name, "private": self.server.repos[name], "siblings": [], "tags": []})
        else:
            self._answer({}, 404 if "/models/" in self.path else 401, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.repos[f"me/{asked['name']}"] = asked.get("private", asked.get("visibility") == "private")
            self._answer({"url": f"{address}/me/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": name, **how} for name in names]})
        else:
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{address}/me/x/commit/{'0' * 40}", "commitOid": "0" * 40})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server that speaks as the hub does, on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.role, server.repos, server.commits = "write", {}, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def test_an_export_is_uploaded_as_it_is_to_a_private_repository(tiny_run, hub, capfd):
    assert tiny_run("train.max_steps=1", "export.formats=[]", "sample.max_new_tokens=0")[0] == 0
    arguments = ["runs/tiny", "--format", "hf", "--out", "out", "--push", "mine"]
    assert export.main(arguments) == 0
    out, err = capfd.readouterr()
    assert "push: to me/mine, which will be made, private\n" in out
    assert f"push: done, {huggingface_hub.constants.ENDPOINT}/me/mine" in out
    assert hub.repos == {"me/mine": True}
    (commit,) = hub.commits
    sent = {line["value"]["path"]: line["value"]["content"] for line in commit if line["key"] == "file"}
    files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in Path("out").iterdir()}
    assert sent == files
    assert {"README.md", "loss.svg", "model.safetensors", "config.json"} <= files.keys()
    assert TOKEN not in out + err
    assert not any(TOKEN.encode() in path.read_bytes() for path in Path("out").iterdir())

    hub.repos["me/mine"] = False
    assert export.main([*arguments[:4], "again", "--push", "me/mine"]) == 0
    assert "push: to me/mine, which is there and is public: everybody will see it\n" in capfd.readouterr().out
    assert len(hub.commits) == 2


def refused(capfd, name="mine"):
    """What is said instead of making an export."""
    Path("checkpoint").mkdir(exist_ok=True)
    assert export.main(["checkpoint", "--format", "hf", "--out", "out", "--push", name]) == 2
    assert not Path("out").exists()
    return capfd.readouterr().err


def test_who_is_not_logged_in_is_told_before_the_export(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    err = refused(capfd)
    assert "nobody is logged in" in err
    assert "hf auth login" in err


def test_names_tokens_and_networks_are_looked_at_before_the_export(tmp_path, hub, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "'a/b/c' is no name of a repository. Give a name, or USER/NAME, of" in refused(capfd, "a/b/c")
    hub.role = "read"
    assert "the token may only read" in refused(capfd)
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    err = refused(capfd)
    assert "Log in anew" in err
    assert TOKEN not in err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    err = refused(capfd)
    assert "HF_HUB_OFFLINE" in err
    assert ".." not in err
    assert hub.commits == []


def test_an_upload_that_fails_leaves_the_export(tmp_path, hub, monkeypatch):
    from qgalore.errors import ConfigError
    from qgalore.files import upload

    (tmp_path / "config.json").write_text("{}")
    to = upload.destination("mine", "--push mine")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConfigError, match=r"the upload to me/mine failed.*hf upload me/mine"):
        upload.upload(tmp_path, to)
