"""docs/pictures.py, on a small model, shows what it says it shows."""
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from matplotlib.figure import Figure

import transformer

spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A small model with six blocks of six heads, where a run saves it, and its vocabulary."""
    monkeypatch.chdir(tmp_path)
    *_, itos = transformer.load_data(transformer.TEXT, 64)
    model = tiny_model(len(itos), n_layer=6, n_head=6, n_embd=48, block_size=64)
    save(model, itos)
    return model, itos


def save(model, itos, name="transformer", losses=()):
    """A folder like that of a run: model.pt, and log.csv with a row of losses every 250 steps."""
    (folder := Path("out", name)).mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "config": vars(model.config), "itos": itos}, folder / "model.pt")
    rows = [f"{250 * i},{i},{1e-3 * i},{i / 2},{loss - 0.1},{loss}\n" for i, loss in enumerate(losses)]
    (folder / "log.csv").write_text("step,seconds,learning_rate,grad_norm,train_loss,val_loss\n" + "".join(rows))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name."""
    figures, savefig = {}, Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: savefig(figures.setdefault(path, figure), path))
    return figures


def draw(*args):
    pictures.main([str(arg) for arg in args])


def test_curves_are_drawn_for_each_run(trained, drawn):
    save(*trained, "one", [4, 2, 1.5])
    save(*trained, "other", [4.5])  # only step 0 so far
    draw("curves", "out/one", "out/other", "--out", "two.png")
    losses, = drawn["two.png"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert len(lines) == 4 and lines["out/other: training"] == [[0, 4.4]]
    assert lines["out/one: validation"] == [[0, 4], [250, 2], [500, 1.5]]


@pytest.mark.parametrize("args, message", [(["curves", "out/none"], "none"), (["parts", "out/none"], "train one first"),
                                           (["letters", "out/transformer", "--data", "other.txt"], "set --data")])
def test_what_is_wrong_is_one_line(args, message, trained, capsys):
    Path("other.txt").write_text("ab" * 1000)
    with pytest.raises(SystemExit) as exit:
        draw(*args)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and message in printed.err.splitlines()[-1] and "Traceback" not in printed.err


def test_scaling_shows_each_models_size_and_loss(trained, drawn, monkeypatch, capsys):
    losses = {12: 3.0, 48: 2.0}
    monkeypatch.setattr(transformer, "estimate_loss", lambda model, data, n: losses[model.config.n_embd] + (n != len(data)))
    save(tiny_model(len(trained[1]), n_embd=12), trained[1], "small")
    draw("scaling", "out/small", "out/transformer")
    sizes = [layers * (12 * C * C + 13 * C) + 2 * C for layers, C in ((2, 12), (6, 48))]
    assert [line.get_xydata().tolist() for line in drawn["scaling.png"].axes[0].lines] == [[[sizes[0], 3]], [[sizes[1], 2]]]
    assert f"out/transformer: {sizes[1]:,} parameters without tables, losses 3.0000 and 2.0000\n" in capsys.readouterr().out


def test_gradients_are_those_of_an_untrained_model(trained, drawn, capsys):
    model, itos = trained
    train_data, *_ = transformer.load_data(transformer.TEXT, 64)
    draw("gradients", "out/transformer")
    ours, theirs = (line.get_ydata() for line in drawn["gradients.png"].axes[0].lines)
    assert len(ours) == len(theirs) == 7
    torch.manual_seed(1337)
    model = transformer.GPT(model.config, len(itos))
    model(*transformer.get_batch(train_data, 0, 1337, 16, 64))[1].backward()
    expected = torch.cat([p.grad.flatten() for p in model.blocks[2].parameters()]).square().mean().sqrt().item()
    assert ours[3] == pytest.approx(expected, rel=1e-3) and theirs[3] > 2 * expected
    loss, pytorchs = map(float, re.findall(r"loss ([\d.]+)", capsys.readouterr().out))
    assert loss == pytest.approx(np.log(len(itos)), abs=0.1) and pytorchs > 8


def test_parts_are_left_out_one_by_one(trained, capsys, monkeypatch):
    model, itos = trained
    text = Path(transformer.TEXT).read_text("utf-8")
    Path("text.txt").write_text(text[:3000] + itos, "utf-8")
    *_, val_data, _ = transformer.load_data("text.txt", 64)
    draw("parts", "out/transformer", "--data", "text.txt")
    printed = capsys.readouterr().out
    added = [float(n) for n in re.findall(r"^without .*: ([+-].*)", printed, re.MULTILINE)]
    assert len(added) == 1 + 2 * 6
    whole = transformer.estimate_loss(model, val_data, len(val_data))
    assert f"whole model: {whole:.4f}\n" in printed
    for parts, more in [([model.blocks[0].sa], added[1]), ([model.blocks[1].ffwd], added[4]), ([b.sa for b in model.blocks[1:]], added[0])]:
        with monkeypatch.context() as patch:
            for part in parts:
                patch.setattr(part, "forward", lambda x, *_: 0 * x)
            assert transformer.estimate_loss(model, val_data, len(val_data)) - whole == pytest.approx(more, abs=1e-4)
    windows = torch.from_numpy(val_data).long().unfold(0, 65, 50)
    for n, loss in re.findall(r"^ *(\d+): ([\d.]+)", printed, re.MULTILINE):
        expected = torch.nn.functional.cross_entropy(model(windows[:, -int(n) - 1:-1])[0][:, -1], windows[:, -1])
        assert float(loss) == pytest.approx(expected.item(), abs=1e-3)
    assert re.findall(r"^ *(\d+): ", printed, re.MULTILINE) == ["1", "2", "4", "8", "16", "32", "64"]


def test_an_induction_head_would_be_found(trained, monkeypatch, capsys):
    def attention(q, k, v, mask, *more):  # head 2: what followed 32 positions ago; head 5: the character before
        weights = mask.softmax(dim=-1).repeat(6, 1, 1)
        weights[1, 31:], weights[4, 1:] = torch.eye(64)[:33], torch.eye(64)[:63]
        return weights @ v

    monkeypatch.setattr(transformer, "attention", attention)
    draw("heads", "out/transformer")
    even, *rows = re.findall(r"(?:even spread of attention:|block \d) (.*)", capsys.readouterr().out)
    rows = [line.split() for line in rows]
    assert rows[:6] == [[even, "0.0%", even, even, "100.0%", even]] * 6  # then two and three characters before
    assert rows[6:18] == [[even, "0.0%", even, even, "0.0%", even]] * 12
    assert rows[18:] == [[even, "100.0%", even, even, "0.0%", even]] * 6 and transformer.attention is attention


def test_attention_is_drawn_as_the_model_computes_it(trained, drawn, monkeypatch):
    model, itos = trained
    monkeypatch.setattr(pictures, "SHOWN", [(1, 2, "this"), (2, 1, ""), (3, 3, ""), (6, 6, "")])
    idx = torch.tensor(transformer.encode(pictures.SPEECH, itos)).long()[None]
    draw("attention", "out/transformer")
    images = [ax.images[0].get_array() for ax in drawn["attention.png"].axes]
    assert len(images) == 4 and "block 1, head 2: this" == drawn["attention.png"].axes[0].get_title()
    q, k, _ = (part[0, :, 8:16] for part in model.blocks[0].sa.qkv(model.blocks[0].ln1(
        model.token_embedding_table(idx) + model.position_embedding_table.weight[:idx.size(1)])).split(48, dim=-1))
    expected = (q @ k.T / 8**0.5).masked_fill(torch.ones(2 * [idx.size(1)]).triu(1) == 1, float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(torch.tensor(images[0]), expected, atol=1e-5, rtol=0)


def test_letters_are_drawn_and_capitals_find_their_own(trained, drawn, capsys):
    model, itos = trained
    pairs = [c + ("y" if c == "X" else c.lower()) for c in itos if c.isupper()]  # but X is like y
    table = model.token_embedding_table.weight.data
    for capital, small in pairs:
        table[itos.index(capital)] = table[itos.index(small)] + 0.1 * torch.randn(48)
    save(model, itos)
    draw("letters", "out/transformer")
    assert capsys.readouterr().out.split() == pairs
    texts = [text.get_text() for text in drawn["letters.png"].axes[0].texts]
    assert len(texts) == len(set(texts)) and {c for c, _ in pairs} | {"¶"} < set(texts)
