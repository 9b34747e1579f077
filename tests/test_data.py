"""The data loading, in both scripts: text to integers and back, the split, the batches."""
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

both = pytest.mark.parametrize("script", [bigram, transformer], ids=lambda script: script.__name__)


def load(script, path, block_size=1):
    train_data, val_data, itos = script.load_data(path, block_size)
    return np.concatenate([train_data, val_data]), itos


@both
@pytest.mark.parametrize("text", ["hello world, hello again", "Быть или не быть, вот в чём вопрос", "生存还是毁灭,这是一个问题生存还是毁灭",
                                  "أكون أو لا أكون ذلك هو السؤال", "🎭💀🎭 to be 💀 or not 👑🎭🎭", "e\u0301tude, été\x00\x7f\t\n..........."])
def test_round_trip_in_several_scripts(script, text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    data, itos = load(script, path)
    assert itos == "".join(sorted(set(text)))
    assert script.decode(data, itos) == text
    assert script.encode(text, itos).tolist() == [itos.index(c) for c in text] == data.tolist()


@both
@given(text=st.text(st.characters(), min_size=1))
def test_round_trip_of_any_text(script, text):
    itos = "".join(sorted(set(text)))
    assert script.decode(script.encode(text, itos), itos) == text


def test_a_character_that_the_vocabulary_lacks_is_named():
    for text, missing in [("abécab", "'é'"), ("d", "'d'"), ("\udcff", r"'\\udcff'")]:
        with pytest.raises(transformer.UserError, match=missing):
            transformer.encode(text, "abc")
    assert transformer.encode("", "abc").tolist() == []


@both
@pytest.mark.skipif(os.name == "nt", reason="named pipes")
def test_line_ends_and_byte_order_mark_through_a_pipe_that_can_be_read_once(script, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = b"\xef\xbb\xbf" + b"one\r\ntwo\rthree\n" * 1000
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text,))
    writer.start()
    data, itos = load(script, tmp_path / "pipe")
    writer.join()
    assert script.decode(data, itos) == "one\ntwo\nthree\n" * 1000


@both
@pytest.mark.parametrize("text", ["to be or not to be " * 100, "Быть или не быть " * 100])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_refused(script, text, encoding, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(script.UserError, match="UTF-16"):
        script.load_data(path, 8)
    path.write_text(text + "\0\n" * 3, encoding="utf-8")  # a few NULs are no UTF-16
    script.load_data(path, 8)


@both
@pytest.mark.parametrize("block_size", [1, 32])
def test_too_short_says_how_long_it_must_be(script, block_size, tmp_path):
    path = tmp_path / "text.txt"
    needed = 10 * block_size + 1
    path.write_text("a" * needed)
    assert len(script.load_data(path, block_size)[1]) == block_size + 1
    for length in (needed - 1, 0):
        path.write_text("a" * length)
        with pytest.raises(script.UserError, match=str(needed)):
            script.load_data(path, block_size)


@both
def test_batches(script):
    data = np.arange(1000, dtype=np.int32)  # so that a number is its own position
    seen = set()
    for step in range(200):
        x, y = script.get_batch(data, step, seed=1, batch_size=8, block_size=10)
        assert x.shape == y.shape == (8, 10) and x.dtype == y.dtype == torch.int64
        assert (x == x[:, :1] + torch.arange(10)).all()  # windows are contiguous
        assert (y == x + 1).all()  # targets are inputs moved by one
        seen.update(x.flatten().tolist(), y.flatten().tolist())
    assert seen == set(range(1000))  # every character is used, the first and the last too
    torch.rand(1), np.random.rand()  # generators elsewhere have no say
    assert torch.equal(script.get_batch(data, step, 1, 8, 10)[0], x)
    assert not torch.equal(script.get_batch(data, step, 2, 8, 10)[0], x)


@both
def test_training_never_sees_the_last_tenth(script, tmp_path):
    (tmp_path / "text.txt").write_text("a" * 900 + "b" * 100)
    train_data, val_data, itos = script.load_data(tmp_path / "text.txt", 16)
    assert (train_data.tolist(), val_data.tolist(), itos) == ([0] * 900, [1] * 100, "ab")


@both
def test_which_text_is_read_by_default(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copy(script.__file__, tmp_path)  # in a folder where nothing else is
    with pytest.raises(SystemExit) as end:
        runpy.run_path(copy)["main"](["--device", "cpu"])
    assert end.value.code == 2 and f"there is no text {tmp_path / 'input.txt'}: give one with --data" in capsys.readouterr().err
    for path in (tmp_path / "input.txt", tmp_path / "data" / "tinyshakespeare" / "input.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with pytest.raises(SystemExit):
            runpy.run_path(copy)["main"](["--device", "cpu"])
        assert f"the text {path} is too short (0 characters)" in capsys.readouterr().err
