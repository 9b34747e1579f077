"""What the tests share: the scripts under test, a small text, and ways to run a script as a user does."""
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformer  # noqa: E402

torch.set_num_threads(1)  # the models in the tests are tiny

TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, device="cpu", precision="fp32")
TINY_FLAGS = [part for name, value in TINY.items() for part in ("--" + name.replace("_", "-"), str(value))]


def tiny_model(vocab_size=11, **changes):
    """A small GPT with weights large enough for its outputs to differ clearly, ready for sampling."""
    torch.manual_seed(0)
    model = transformer.GPT(transformer.Config(**{**TINY, **changes}), vocab_size).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def run(script, *args, cwd=None, **env):
    """Runs a script of this project just as a user does; returns what subprocess.run returns."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, encoding="utf-8", timeout=100)


def status(script, *args):
    """Calls a script's main in this process; returns the exit status."""
    try:
        return script.main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code


# Importing torch takes seconds, and many tests need a process of their own. This one imports
# once, and each test's process is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["transformer", "torch._dynamo"])  # the latter is what optimisers import


def in_child(argv, cwd, output):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the fork server ignores
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # as if it were not installed
    sys.exit(transformer.main(argv))


class Command:
    """A transformer.py at work: its process, and what it has printed so far."""

    def __init__(self, *args, cwd=None):
        self.output = tempfile.mktemp(prefix="command")
        self.process = processes.Process(target=in_child, args=([*map(str, args)], str(cwd or os.getcwd()), self.output))
        self.process.start()

    def read(self, name):
        path = Path(f"{self.output}.{name}")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, text):
        """Waits until the text is printed, or the process has ended."""
        while text not in self.read("out") and self.process.is_alive():
            time.sleep(0.002)

    def wait(self):
        self.process.join(timeout=60)
        assert self.process.exitcode is not None, "still at work after a minute"
        self.returncode, self.stdout, self.stderr = self.process.exitcode, self.read("out"), self.read("err")
        for name in ("out", "err"):
            Path(f"{self.output}.{name}").unlink(missing_ok=True)
        return self


def fork(*args, **how):
    """Like run("transformer.py", ...), without the seconds for the import."""
    return Command(*args, **how).wait()


def some_text():
    return "".join(f"Speaker {i % 7}:\nline {i * i} of the text.\n\n" for i in range(200))[:4000]


@pytest.fixture
def text_file(tmp_path):
    """A text of 4,000 characters."""
    path = tmp_path / "text.txt"
    path.write_text(some_text())
    return path
