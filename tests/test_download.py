"""data/tinyshakespeare/download.py against a server on this machine, as it is and as it may misbehave."""
import hashlib
import http.server
import importlib.util
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

SCRIPT = ROOT / "data" / "tinyshakespeare" / "download.py"
spec = importlib.util.spec_from_file_location("download", SCRIPT)
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)

TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 1000
DIGEST = hashlib.sha256(TEXT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        body = {"/right": TEXT, "/wrong": b"<html>not it</html>", "/broken": TEXT[:5000], "/silent": b""}[self.path]
        self.send_response(200)
        self.send_header("Content-Length", len(TEXT) if self.path in ("/broken", "/silent") else len(body))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/silent":  # says that something comes, and then nothing does
            self.server.test_over.wait()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.test_over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.test_over.set()
    server.shutdown()


@pytest.mark.parametrize("path", ["/right", "/wrong", "/broken", "/missing", "/silent"])
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_the_right_file_is_kept_and_anything_else_changes_nothing(server, tmp_path, path, before):
    target = tmp_path / "input.txt"
    if before is not None:
        target.write_bytes(before)
    if path == "/right":
        assert download.download(server + path, target, DIGEST) is True
        assert download.download("http://127.0.0.1:9/", target, DIGEST) is False  # now no server is needed
    else:
        with pytest.raises((OSError, ValueError)):
            download.download(server + path, target, DIGEST, timeout=0.3)
    after = TEXT if path == "/right" else before
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if after is None else [after])


def test_as_a_command_without_network(tmp_path):
    """A copy of the script whose address leads nowhere: one line on standard error, no file."""
    script = tmp_path / "download.py"
    script.write_text(SCRIPT.read_text().replace(download.URL, "http://127.0.0.1:9/input.txt"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("download.py: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [script]
