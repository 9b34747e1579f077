"""bigram.py: the model, its exact loss, the floor by counting, and the script as a user runs it."""
import csv
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import bigram


def test_parameters():
    assert sum(p.numel() for p in bigram.BigramLanguageModel(65).parameters()) == 4225


def test_pairs_are_counted():
    counts = bigram.count_pairs(np.array([0, 1, 1, 2, 0, 1], dtype=np.uint8), 3)
    assert counts.tolist() == [[0, 2, 0], [0, 1, 1], [1, 0, 0]]


def test_pairs_are_counted_across_the_pieces_of_a_large_text():
    counts = bigram.count_pairs(np.tile(np.arange(3, dtype=np.uint8), 1_000_000), 3)
    assert counts.tolist() == [[0, 1_000_000, 0], [0, 0, 1_000_000], [999_999, 0, 0]]


def test_the_exact_loss_is_the_models_loss():
    torch.manual_seed(0)
    model, data = bigram.BigramLanguageModel(5), np.random.default_rng(0).integers(5, size=1000)
    _, loss = model(torch.from_numpy(data[None, :-1]), torch.from_numpy(data[None, 1:]))
    table = model.token_embedding_table.weight.detach()
    assert bigram.bigram_loss(table, bigram.count_pairs(data, 5)) == pytest.approx(loss.item(), abs=1e-6)


def test_generate_appends_what_the_table_says():
    model = bigram.BigramLanguageModel(4)
    with torch.no_grad():  # each character is followed by the next one, the last one by the first
        model.token_embedding_table.weight.copy_(100 * torch.eye(4).roll(1, dims=1))
    out = model.generate(torch.tensor([[0], [2]]), max_new_tokens=5)
    assert out.tolist() == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]


def test_a_run_reaches_the_floor_and_is_repeatable(tmp_path, monkeypatch, capsys):
    """The whole script, on the built-in text, from another folder: close to what counting gives, and again the same."""
    first = run("bigram.py", "--data", ROOT / "input.txt", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert "1,317,812 characters, 62 distinct" in lines[0] and "3,844 parameters" in lines[1]
    reached, floor = ([float(figure) for figure in re.search(start + ".*train loss ([.0-9]+), val loss ([.0-9]+)",
                                                             first.stdout).groups()] for start in ("step 2000", "by counting"))
    assert floor[0] < reached[0] < floor[0] + 0.008 and abs(reached[1] - floor[1]) < 0.008

    out = tmp_path / "out" / "bigram"
    assert {file.name for file in out.iterdir()} == {"model.pt", "log.csv", "sample.txt"}
    assert len((out / "sample.txt").read_text()) == 500 and (out / "sample.txt").read_text() in first.stdout
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert list(rows[0]) == "step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm".split(",")
    assert float(rows[-1]["train_loss"]) == reached[0] and int(rows[-1]["step"]) == 2000
    saved = torch.load(out / "model.pt", weights_only=True)
    assert saved["model"]["token_embedding_table.weight"].shape == (62, 62) and len(saved["itos"]) == 62

    monkeypatch.chdir(tmp_path)
    assert bigram.main(["--data", str(ROOT / "input.txt")]) == 0
    assert capsys.readouterr().out == first.stdout
    assert (out / "model.pt.old").exists()  # the first run's files were not lost


def test_the_floor_is_that_of_counting():
    """For text in which every character is followed by one of two equally often, the floor is ln 2."""
    data = np.random.default_rng(0).integers(2, size=100_000)
    counts = bigram.count_pairs(data, 2)
    assert bigram.bigram_loss(counts.log(), counts) == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("args, message", [
    (["--data", "nope.txt"], "nope.txt"),
    (["--data", "."], "directory"),
    (["--max-iters", "0"], "--max-iters"),
    (["--max-iters", "x"], "--max-iters"),
    (["--seed", "-1"], "--seed"),
    (["--device", "abacus"], "abacus"),
    (["--unknown", "1"], "--unknown"),
])
def test_bad_input_gets_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bigram.main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("bigram.py: ")
    assert not list(tmp_path.iterdir())
