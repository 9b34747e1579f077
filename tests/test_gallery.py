"""docs/pictures.py and every snippet of docs/training.md, at a size for a test, show what they say they show."""
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, tiny_model
from matplotlib.figure import Figure

import transformer

spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)
PAGES = (ROOT / "docs" / "training.md").read_text("utf-8")


def show(heading, old="", new=""):
    """Runs the snippet under a heading, with one replacement; returns its variables."""
    code, = re.findall(rf"\n## {re.escape(heading)}\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGES, re.DOTALL)
    assert old in code
    exec(code.replace(old, new), names := {})
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in; what a snippet replaces is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformer.Block, "forward", transformer.Block.forward)
    for name in "attention", "make_optimizers", "GPT":
        monkeypatch.setattr(transformer, name, getattr(transformer, name))


@pytest.fixture
def trained(folder):
    """A small model with six blocks of six heads, where a run saves it, and its vocabulary."""
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


def test_every_snippet_has_a_test():
    assert PAGES.count("```python\n") == len(set(re.findall(r'show\("(.+?)"', Path(__file__).read_text("utf-8"))))


def draw(*args):
    pictures.main([str(arg) for arg in args])


def test_curves_are_drawn_for_each_run(trained, drawn, capsys):
    save(*trained, "one", [4, 2, 1.5])
    save(*trained, "other", [4.5])  # only step 0 so far
    draw("curves", "out/one", "out/other", "--bigram", 2.49, "--out", "two.png")
    losses, = drawn["two.png"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert lines["out/one: validation"] == [[0, 4], [250, 2], [500, 1.5]] and lines["out/other: training"] == [[0, 4.4]]
    assert [line.get_ydata()[0] for line in losses.lines[4:]] == [np.log(len(trained[1])), 2.49]


@pytest.mark.parametrize("args, message", [(["curves", "out/none"], "none"), (["parts", "out/none"], "train one first"),
                                           (["letters", "out/transformer", "--data", "other.txt"], "set --data")])
def test_what_is_wrong_is_one_line(args, message, trained, capsys):
    Path("other.txt").write_text("ab" * 1000)
    with pytest.raises(SystemExit) as exit:
        draw(*args)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and message in printed.err.splitlines()[-1] and "Traceback" not in printed.err


@pytest.mark.parametrize("name", ["head", "head_ffwd", "head_ffwd_residual"])
def test_the_variants_train_and_generate(name, folder, text_file, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variant.py", name, "--data", str(text_file), *TINY_FLAGS, "--max-iters", "3"])
    with pytest.raises(SystemExit) as exit:
        show("From bigram to GPT in numbers")
    assert not exit.value.code
    x, block = torch.randn(1, 3, 16), transformer.load_checkpoint(f"out/{name}/model.pt")[0].blocks[0]
    parts = {"head": block.sa(x), "head_ffwd": block.ffwd(block.sa(x)),
             "head_ffwd_residual": x + block.sa(x) + block.ffwd(x + block.sa(x))}
    torch.testing.assert_close(block(x), parts[name])


def test_gradients_are_recorded_and_drawn(folder, drawn, text_file, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["snippet.py", "--data", str(text_file), *TINY_FLAGS, "--max-iters", "3"])
    names = show("Gradient flow", "(0, 100, 1000)", "(0, 1, 2)")
    rows = re.findall(r"(\w+), step (\d):(?: [\d.]+e-\d\d){3}\n", capsys.readouterr().out)
    assert rows == [(name, step) for name in ("GPT", "PyTorch") for step in "012"]
    (data, _, itos), (left, right) = transformer.load_data(text_file, 16), drawn["gradients.png"].axes
    for start, line in ((names["GPT"], left.lines[0]), (names["PyTorchStart"], right.lines[0])):  # step 0
        torch.manual_seed(1337)
        model = start(transformer.Config(**TINY), len(itos))
        model(*transformer.get_batch(data, 0, 1337, 4, 16))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        expected = [torch.cat([p.grad.flatten() for p in part.parameters()]).square().mean().sqrt().item()
                    for part in (model.token_embedding_table, *model.blocks)]
        assert line.get_ydata() == pytest.approx(expected, rel=1e-4)
    assert 0.9 < model.lm_head.weight.std() < 1.1  # PyTorch's own start, not GPT's 0.02


def test_scaling_is_drawn_with_a_line_through_the_largest_three(folder, drawn, monkeypatch, capsys):
    sizes = {4: 3.0, 8: 2.0, 12: 1.8, 16: 1.7, 20: 1.65}
    monkeypatch.setattr(transformer, "estimate_loss", lambda model, data, max_tokens: sizes[model.config.n_embd])
    for n in sizes:
        save(tiny_model(n_embd=n), "0123456789+", f"scaling-{n}")
    show("Scaling", "(40, 72, 120, 220, 384)", str(tuple(sizes)))
    whole, fitted, dots = (line.get_xydata() for line in drawn["scaling.png"].axes[0].lines)
    parameters = [2 * (12 * n * n + 13 * n) + 2 * n for n in sizes]
    assert dots.tolist() == [list(pair) for pair in zip(parameters, sizes.values())] and len(whole) == 5
    (slope, _), (x, y) = np.polyfit(np.log(parameters[2:]), np.log([1.8, 1.7, 1.65]), 1), np.log(fitted).T
    assert np.diff(y) / np.diff(x) == pytest.approx([slope, slope])
    assert f"loss by {10**slope:.3f}\n" in capsys.readouterr().out


def test_parts_are_left_out_one_by_one(trained, capsys, monkeypatch):
    model, itos = trained
    _, val_data, _ = transformer.load_data(transformer.TEXT, 64)
    pictures.parts(model, val_data, 500)
    printed = capsys.readouterr().out
    added = [float(n) for n in re.findall(r"^without .*: ([+-].*)", printed, re.MULTILINE)]
    assert len(added) == 1 + 2 * 6
    whole = transformer.estimate_loss(model, val_data, 500)  # all is back
    assert f"whole model: {whole:.4f}\n" in printed
    for parts, more in [([model.blocks[0].sa], added[1]), ([model.blocks[1].ffwd], added[4]), ([b.sa for b in model.blocks[1:]], added[0])]:
        with monkeypatch.context() as patch:
            for part in parts:
                patch.setattr(part, "forward", lambda x, *_: 0 * x)
            assert transformer.estimate_loss(model, val_data, 500) - whole == pytest.approx(more, abs=1e-4)
    windows = torch.from_numpy(val_data).long().unfold(0, 65, 200)
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
    before, followed = [even, "0.0%", even, even, "100.0%", even], [even, "100.0%", even, even, "0.0%", even]
    assert [line.split() for line in rows] == [before] * 6 + [followed] * 6 and transformer.attention is attention


def test_attention_is_drawn_as_the_model_computes_it(trained, drawn):
    model, itos = trained
    text = "KING:\nMy god"
    idx = torch.tensor(transformer.encode(text, itos)).long()[None]
    before = model(idx)[0]
    figure = pictures.attention(model, itos, [(1, 2, "this"), (2, 1, ""), (3, 3, ""), (6, 6, "")], text)
    images = [ax.images[0].get_array() for ax in figure.axes]
    assert torch.equal(model(idx)[0], before) and len(images) == 4 and "block 1, head 2: this" == figure.axes[0].get_title()
    q, k, _ = (part[0, :, 8:16] for part in model.blocks[0].sa.qkv(model.blocks[0].ln1(
        model.token_embedding_table(idx) + model.position_embedding_table.weight[:len(text)])).split(48, dim=-1))
    expected = (q @ k.T / 8**0.5).masked_fill(torch.ones(len(text), len(text)).triu(1) == 1, float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(torch.tensor(images[0]), expected, atol=1e-5, rtol=0)
    draw("attention", "out/transformer")
    assert len(drawn["attention.png"].axes) == 4


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
