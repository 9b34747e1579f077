"""The data loading, in both scripts: text to integers and back, the split, the batches."""
import hashlib
import inspect

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, strategies as st

import bigram
import transformer

both = pytest.mark.parametrize("script", [bigram, transformer], ids=lambda script: script.__name__)

SHARED = ["UserError", "find_data", "read_pieces", "code_points", "encode", "decode", "load_data", "get_batch",
          "pick_device", "Parser", "add_flags"]


@pytest.mark.parametrize("name", SHARED)
def test_the_scripts_share_their_data_loading_word_for_word(name):
    assert inspect.getsource(getattr(bigram, name)) == inspect.getsource(getattr(transformer, name))


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


@both
def test_a_character_that_the_vocabulary_lacks_is_named(script):
    with pytest.raises(script.UserError, match="'é'"):
        script.encode("abécab", "abc")
    with pytest.raises(script.UserError, match="'d'"):  # beyond the last one, too
        script.encode("d", "abc")
    assert script.encode("", "abc").tolist() == []


@both
def test_the_built_in_text(script):
    data, itos = load(script, ROOT / "input.txt")
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest().startswith("d7f0805b1289ca09")
    assert (len(data), len(itos), data.dtype) == (1_317_812, 62, np.uint8)
    assert itos == "".join(sorted(set(text)))
    assert script.decode(data, itos) == text


@both
def test_tiny_shakespeare_has_the_lectures_vocabulary(script):
    path = ROOT.parent / "shared" / "tinyshakespeare" / "input.txt"
    if not path.exists():
        path = ROOT / "data" / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip("not fetched: python data/tinyshakespeare/download.py")
    data, itos = load(script, path)
    assert itos == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert len(data) == 1_115_394


@both
@pytest.mark.parametrize("count, dtype", [(1, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_the_smallest_integers_that_hold_the_vocabulary(script, count, dtype, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + count))) * 20, encoding="utf-8")
    data, itos = load(script, path)
    assert (len(itos), data.dtype, data.max()) == (count, dtype, count - 1)


@both
def test_a_text_longer_than_one_piece_and_the_split(script, tmp_path):
    path = tmp_path / "text.txt"
    text = "0123456789é" * 200_000  # 2.2 million characters: three pieces
    path.write_text(text, encoding="utf-8")
    train_data, val_data, itos = script.load_data(path, 8)
    assert len(train_data) == int(0.9 * len(text)) and len(train_data) + len(val_data) == len(text)
    assert (np.concatenate([train_data, val_data]).reshape(-1, 11) == np.arange(11)).all()


@both
def test_line_ends_and_byte_order_mark(script, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\rthree\n" * 10)
    data, itos = load(script, path)
    assert script.decode(data, itos) == "one\ntwo\nthree\n" * 10


@both
@pytest.mark.parametrize("good", [0, 10, 100_000])
def test_not_utf8_says_at_which_byte(script, good, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("é".encode() * (good // 2) + b"\xff" + b"more text" * 100)
    with pytest.raises(script.UserError, match=rf"byte {good}$"):
        script.load_data(path, 8)
    path.write_bytes("é".encode() * (good // 2) + b"\xc3")  # breaks off inside a character
    with pytest.raises(script.UserError, match=rf"byte {good}$"):
        script.load_data(path, 8)


@both
@pytest.mark.parametrize("block_size", [1, 8, 255, 256])
def test_too_short_says_how_long_it_must_be(script, block_size, tmp_path):
    path = tmp_path / "text.txt"
    needed = 10 * (block_size + 1)
    path.write_text("ab" * (needed // 2))
    train_data, val_data, _ = script.load_data(path, block_size)
    assert min(len(train_data), len(val_data)) > block_size
    path.write_text(("ab" * needed)[:needed - 10])
    with pytest.raises(script.UserError, match=str(needed)):
        script.load_data(path, block_size)
    path.write_text("")
    with pytest.raises(script.UserError, match=str(needed)):
        script.load_data(path, block_size)


@both
def test_batches(script):
    data = np.arange(1000, dtype=np.uint16)  # so that a number is its own position
    seen = set()
    for step in range(200):
        x, y = script.get_batch(data, step, seed=1, batch_size=8, block_size=10)
        assert x.shape == y.shape == (8, 10) and x.dtype == y.dtype == torch.int64
        assert (x == x[:, :1] + torch.arange(10)).all()  # windows are contiguous
        assert (y == x + 1).all()  # targets are inputs moved by one
        seen.update(x.flatten().tolist(), y.flatten().tolist())
    assert seen == set(range(1000))  # every character is used, the first and the last too


@both
def test_a_batch_depends_on_seed_and_step_alone(script):
    data = np.arange(1000, dtype=np.uint16)

    def batch(step, seed):
        torch.rand(1), np.random.rand()  # generators elsewhere have no say
        return script.get_batch(data, step, seed, 8, 10)[0]

    assert torch.equal(batch(5, 1), batch(5, 1))
    assert not torch.equal(batch(5, 1), batch(6, 1))
    assert not torch.equal(batch(5, 1), batch(5, 2))


@both
def test_windows_never_cross_into_validation(script, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 900 + "b" * 100)
    train_data, val_data, itos = script.load_data(path, 16)
    for step in range(100):
        for x in script.get_batch(train_data, step, 0, 32, 16):
            assert (x == itos.index("a")).all()
    assert (val_data == itos.index("b")).all()


@both
def test_which_text_is_read_by_default(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    assert script.find_data("") == tmp_path / "input.txt"
    fetched = tmp_path / "data" / "tinyshakespeare" / "input.txt"
    fetched.parent.mkdir(parents=True)
    fetched.touch()
    assert script.find_data("") == fetched
    assert str(script.find_data("mine.txt")) == "mine.txt"
