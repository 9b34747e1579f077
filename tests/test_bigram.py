"""bigram.py: the model, its exact loss, and the script as a user runs it."""
import io
import itertools
import re
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


def test_a_run_reaches_what_counting_gives_and_is_repeatable(tmp_path, monkeypatch, capsys):
    """The whole script, on the built-in text, from another folder; it leaves nothing behind."""
    first = run("bigram.py", "--data", ROOT / "input.txt", cwd=tmp_path)
    assert first.returncode == 0 and first.stderr == "" and not list(tmp_path.iterdir())
    assert "1,317,812 characters, 62 distinct" in first.stdout and "3,844 parameters" in first.stdout
    trained, counted = losses(first.stdout, "step 2000"), losses(first.stdout, "counted instead")
    assert trained == pytest.approx(counted, abs=0.008)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    ids = np.unique(list(text), return_inverse=True)[1]
    pairs = np.ones((62, 62))
    np.add.at(pairs, (ids[:len(ids) * 9 // 10 - 1], ids[1:len(ids) * 9 // 10]), 1)
    logs = np.log(pairs / pairs.sum(axis=1, keepdims=True))
    val = ids[len(ids) * 9 // 10:]
    assert counted[1] == pytest.approx(-logs[val[:-1], val[1:]].mean(), abs=1e-4)
    assert len(first.stdout.split("\n\n", 1)[1]) == 500 + 1

    monkeypatch.chdir(tmp_path)
    assert not status(bigram, "--data", ROOT / "input.txt")
    assert capsys.readouterr().out == first.stdout


def test_a_large_table_says_what_is_coming_and_how_long_it_takes(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("".join(map(chr, range(0x4E00, 0x5000))) * 2, encoding="utf-8")
    seconds = itertools.count(step=5)
    monkeypatch.setattr(bigram.time, "perf_counter", lambda: next(seconds))
    assert not status(bigram, "--data", tmp_path / "text.txt", "--max-iters", 3)
    printed = capsys.readouterr().out
    assert "262,144 parameters" in printed and re.search(r"^step 2, about \d+ s left", printed, re.MULTILINE)


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def model(vocab_size):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 576000000 bytes")

    monkeypatch.setattr(bigram, "BigramLanguageModel", model)
    assert status(bigram, "--data", ROOT / "input.txt") == 2
    assert re.fullmatch("bigram.py: error: out of memory.*\n", capsys.readouterr().err)
    monkeypatch.setattr(bigram, "BigramLanguageModel", lambda vocab_size: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):  # a mistake of someone who changes the model keeps its traceback
        bigram.main(["--data", str(ROOT / "input.txt")])


def test_any_standard_output_will_do(monkeypatch):
    with redirect_stdout(io.StringIO()) as printed:
        assert not status(bigram, "--data", ROOT / "input.txt", "--max-iters", 1)
    assert "step 1: train loss" in printed.getvalue()
    monkeypatch.setattr(sys, "stdout", None)
    assert not status(bigram, "--data", ROOT / "input.txt", "--max-iters", 1)
    done = subprocess.run(f"{sys.executable} {ROOT}/bigram.py --max-iters 1 | head -n 1", shell=True, capture_output=True)
    assert done.stdout.startswith(b"text ") and done.stderr == b""


@pytest.mark.parametrize("args, message", [
    (["--data", "nope.txt"], "no text nope.txt"), (["--data", "."], "directory"), (["--data", ""], "--data"),
    (["--data", ROOT / "docs" / "curves.png"], "curves.png is not UTF-8 text: see byte 0; save it as UTF-8"),
    (["--max-iters", "0"], "--max-iters"), (["--max-iters", "x"], "--max-iters"), (["--seed", "-1"], "--seed"),
    (["--device", "abacus"], "abacus"), (["--unknown", "1"], "--unknown"),
])
def test_bad_input_gets_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status(bigram, *args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "[Errno" not in captured.err and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("bigram.py: ")
    assert not list(tmp_path.iterdir())
