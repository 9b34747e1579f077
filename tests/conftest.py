"""What the tests share: the scripts under test, a small text, and a way to run a script as a user does."""
import os
import subprocess
import sys
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


def run(script, *args, cwd=None, **how):
    """Runs a script of this project in a process of its own; returns what subprocess.run returns."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=100, **how)


@pytest.fixture
def text_file(tmp_path):
    """A text of 4,000 characters."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Speaker {i % 7}:\nline {i * i} of the text.\n\n" for i in range(200))[:4000])
    return path
