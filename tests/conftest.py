"""Shared by the tests: the scripts under test, a small text, and ways to run a script as a user does."""
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformer  # noqa: E402

torch.set_num_threads(1)  # the models in the tests are tiny
os.environ["OMP_NUM_THREADS"] = "1"

TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, dropout=0.0, batch_size=4, dtype="float32")
TINY_FLAGS = [part for name, value in TINY.items() for part in ("--" + name.replace("_", "-"), str(value))]
TINY_FLAGS += ["--device", "cpu"]


def tiny_model(vocab_size=11, **changes):
    """A small GPT whose weights are large enough for its outputs to differ clearly, in eval mode."""
    torch.manual_seed(0)
    model = transformer.GPT(transformer.Config(**{**TINY, **changes}), vocab_size).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def run(script, *args, cwd=None, **env):
    """Runs a script in a new Python, as a user does; returns what subprocess.run returns."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env={**os.environ, **env},
                          capture_output=True, encoding="utf-8", timeout=100)


def status(script, *args):
    """Calls a script's main in this process; returns the exit status."""
    try:
        return script.main([str(arg) for arg in args]) or 0
    except SystemExit as end:
        return end.code


# Importing torch takes seconds, and many tests need a process of their own. This one imports it once, and each
# test's process is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["transformer", "torch._dynamo"])  # optimizers import the latter


def in_child(argv, cwd, output, env, kill):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    torch.set_num_threads(1)
    if kill:
        events, fsync = [], os.fsync

        def touches_a_file(event, args):
            if event in ("os.rename", "os.mkdir", "os.remove", "fsync") or event == "open" and "w" in (args[1] or ""):
                events.append(event)
                if len(events) == kill[0]:
                    os.kill(os.getpid(), kill[1])
        os.fsync = lambda handle: (touches_a_file("fsync", handle), fsync(handle))
        sys.addaudithook(touches_a_file)
    sys.exit(transformer.main(argv))


class Command:
    """A running transformer.py. kill=(n, signal) sends it a signal just before it touches a file for the n-th time."""

    def __init__(self, *args, cwd=None, env={}, kill=None):
        self.output = tempfile.mktemp(prefix="command")
        args = [*map(str, args)], str(cwd or os.getcwd()), self.output, env, kill
        self.process = processes.Process(target=in_child, args=args, daemon=True)  # ends with pytest
        self.process.start()

    def wait(self):
        self.process.join(timeout=60)
        assert self.process.exitcode is not None, "still running after a minute"
        files = [Path(f"{self.output}.{name}") for name in ("out", "err")]
        self.returncode, (self.stdout, self.stderr) = self.process.exitcode, [file.read_text("utf-8") for file in files]
        for file in files:
            file.unlink()
        return self


def fork(*args, **how):
    """Like run("transformer.py", ...), without the seconds for the import."""
    return Command(*args, **how).wait()


def some_text():
    return "".join(f"Speaker {i % 7}:\nline {i * i} of the text.\n\n" for i in range(200))[:4000]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text of 4,000 characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(some_text())
    return path
