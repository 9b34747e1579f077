"""The data loading, the same in both scripts: text to integers and back, the split, the batches."""
import inspect
import os
import runpy
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import bigram
import transformer
from transformer import decode, encode, get_batch, load_data


@pytest.mark.parametrize("name", ["UserError", "encode", "decode", "load_data", "get_batch"])
def test_both_scripts_have_the_same_data_functions(name):
    assert inspect.getsource(getattr(bigram, name)) == inspect.getsource(getattr(transformer, name))


@given(text=st.text(st.characters(), min_size=1))
def test_round_trip_of_any_text(text):
    itos = "".join(sorted(set(text)))
    ids = encode(text, itos)
    assert ids.tolist() == [itos.index(c) for c in text] and decode(ids, itos) == text
    with pytest.raises(KeyError, match="é"):
        encode("abécab", "abc")


@pytest.mark.skipif(os.name == "nt", reason="named pipes")
def test_line_ends_and_byte_order_mark_through_a_pipe_that_can_be_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = b"\xef\xbb\xbf" + "été\n".encode() + b"one\r\ntwo\rthree\n" * 1000
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text,), daemon=True).start()
    train_data, val_data, itos = load_data(tmp_path / "pipe", 1)
    assert decode([*train_data, *val_data], itos) == "été\n" + "one\ntwo\nthree\n" * 1000


def test_the_last_tenth_is_for_validation_and_a_short_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 900 + "b" * 100)
    train_data, val_data, itos = load_data(path, 16)
    assert (train_data.tolist(), val_data.tolist(), itos) == ([0] * 900, [1] * 100, "ab")
    for block_size in (1, 32):
        needed = 10 * block_size + 1
        path.write_text("a" * needed)
        assert len(load_data(path, block_size)[1]) == block_size + 1
        for length in (needed - 1, 0):
            path.write_text("a" * length)
            with pytest.raises(transformer.UserError, match=str(needed)):
                load_data(path, block_size)


def test_batches():
    data = np.arange(1000, dtype=np.int32)  # so that a number is its own position
    seen = set()
    for step in range(200):
        x, y = get_batch(data, step, seed=1, batch_size=8, block_size=10)
        assert x.shape == y.shape == (8, 10) and x.dtype == y.dtype == torch.int64
        assert (x == x[:, :1] + torch.arange(10)).all() and (y == x + 1).all()
        seen.update(x.flatten().tolist(), y.flatten().tolist())
    assert seen == set(range(1000))  # every character is used, the first and the last too
    torch.rand(1), np.random.rand()  # other generators have no influence
    assert torch.equal(get_batch(data, step, 1, 8, 10)[0], x)
    assert not torch.equal(get_batch(data, step, 2, 8, 10)[0], x)


@pytest.mark.parametrize("script", [bigram, transformer], ids=lambda script: script.__name__)
def test_which_text_is_read_by_default(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copy(script.__file__, tmp_path)  # in a folder where nothing else is
    alone, fetched = tmp_path / "input.txt", tmp_path / "data" / "tinyshakespeare" / "input.txt"
    fetched.parent.mkdir(parents=True)
    for path, made, message in [(alone, None, "FileNotFoundError"), (alone, alone, "too short"), (fetched, fetched, "too short")]:
        if made:
            made.touch()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(copy)["main"]([])
        printed = capsys.readouterr().err
        assert end.value.code == 2 and str(path) in printed and message in printed
