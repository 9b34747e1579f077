"""bigram.py: the model, its exact loss, and the script as a user runs it."""
import io
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import ROOT, run, status

import bigram


def losses(printed, start):
    figures = re.search(f"^{start}: train loss ([.0-9]+), val loss ([.0-9]+)", printed, re.MULTILINE).groups()
    return [float(figure) for figure in figures]


def test_the_model_its_exact_loss_and_what_it_generates():
    model, data = bigram.BigramLanguageModel(4), torch.randint(4, (1000,))
    table = model.token_embedding_table.weight.data
    assert bigram.exact_loss(table, data) == pytest.approx(model(data[None, :-1], data[None, 1:])[1].item(), abs=1e-6)
    table.copy_(100 * torch.eye(4).roll(1, dims=1))  # each character is followed by the next one, the last one by the first
    out = model.generate(torch.tensor([[0], [2]]), max_new_tokens=5)
    assert out.tolist() == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]


def test_a_run_reaches_the_loss_of_the_counts_and_is_repeatable(tmp_path, monkeypatch, capsys):
    """The whole script, on the built-in text, from another folder; it leaves nothing behind."""
    first = run("bigram.py", "--data", ROOT / "input.txt", cwd=tmp_path)
    assert first.returncode == 0 and first.stderr == "" and not list(tmp_path.iterdir())
    assert "1,317,812 characters, 62 distinct" in first.stdout
    trained, counted = losses(first.stdout, "step 2000"), losses(first.stdout, "by counting")
    assert trained == pytest.approx(counted, abs=0.008)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    ids = np.unique(list(text), return_inverse=True)[1]
    pairs = np.ones((62, 62))
    np.add.at(pairs, (ids[:len(ids) * 9 // 10 - 1], ids[1:len(ids) * 9 // 10]), 1)
    logs = np.log(pairs / pairs.sum(axis=1, keepdims=True))
    val = ids[len(ids) * 9 // 10:]
    assert counted[1] == pytest.approx(-logs[val[:-1], val[1:]].mean(), abs=1e-4)
    assert len(first.stdout.split("\n\n", 1)[1]) == 500 + 1

    monkeypatch.setattr(bigram, "max_iters", 20)
    (tmp_path / "ab.txt").write_text("ab" * 45 + "ba" * 5)  # of its 89 pairs for training, 45 are ab and 44 ba
    assert not status(bigram, "--data", tmp_path / "ab.txt")
    assert losses(capsys.readouterr().out, "by counting")[0] == pytest.approx(-(45 * np.log(46 / 47) + 44 * np.log(45 / 46)) / 89, abs=1e-4)
    printed = [(status(bigram, "--data", ROOT / "input.txt"), capsys.readouterr().out) for _ in range(2)]
    assert printed[0] == printed[1] and "step 20: train loss" in printed[0][1]


def test_a_notebook_a_closed_pipe_and_ctrl_c(monkeypatch):
    monkeypatch.setattr(bigram, "max_iters", 1)
    with redirect_stdout(io.StringIO()) as printed:
        assert not status(bigram)
    assert "step 1: train loss" in printed.getvalue()
    done = subprocess.run(f"{sys.executable} {ROOT}/bigram.py | head -n 1", shell=True, capture_output=True)
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""
    def heed_ctrl_c():  # even if whatever started the tests ignores it, as a shell does for a job in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, ROOT / "bigram.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=heed_ctrl_c) as script:
        script.stdout.readline()
        os.kill(script.pid, signal.SIGINT)
        assert script.communicate(timeout=60)[1] == b"" and script.returncode == 130


@pytest.mark.parametrize("args, message", [
    (["--data", "nope.txt"], "nope.txt as UTF-8 text (FileNotFoundError): see --data"), (["--data", "."], "IsADirectoryError"), (["--data", ""], "IsADirectoryError"),
    (["--data", "empty.txt"], "too short"), (["--data", ROOT / "docs" / "curves.png"], "curves.png as UTF-8 text (UnicodeDecodeError)"),
    (["--unknown", "1"], "--unknown"),
])
def test_bad_input_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert status(bigram, *args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and captured.err.count("\n") == 2
