"""Every snippet of docs/training.md and docs/inside.md runs, at a size for a test, and shows what it says it shows."""
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, tiny_model
from matplotlib.figure import Figure

import transformer

PAGES = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("training.md", "inside.md"))


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


def test_curves_are_drawn_for_each_run(trained, drawn, capsys):
    curves = runpy.run_path(str(ROOT / "docs/curves.py"))["main"]
    save(*trained, "one", [4, 2, 1.5])
    save(*trained, "other", [4.5])  # only step 0 so far
    curves(["out/one", "out/other", "--bigram", "2.49", "--out", "two.png"])
    losses, *others = drawn["two.png"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert lines["out/one: validation"] == [[0, 4], [250, 2], [500, 1.5]] and lines["out/other: training"] == [[0, 4.4]]
    assert [line.get_ydata()[0] for line in losses.lines[4:]] == [np.log(len(trained[1])), 2.49]
    assert [ax.lines[0].get_ydata().tolist() for ax in others] == [[0, 1e-3, 2e-3], [0.5, 1]]  # rate, norm
    with pytest.raises(SystemExit) as exit:
        curves(["out/one", "out/none"])
    assert exit.value.code == 2 and re.fullmatch(".*out/none is not a run.*\n", capsys.readouterr().err)


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


def test_the_shapes_are_those_of_the_model(trained, capsys):
    (model, itos), _ = trained, show("Shapes")
    first, second, last = re.split(r"\n +(?=scores)|\n(?=next)", capsys.readouterr().out)
    assert re.findall(r"\w+ \(\d+, \d+\)", first) == ["embedding (5, 48)", "query (5, 8)", "key (5, 8)", "value (5, 8)"]
    weights = torch.tensor([[float(n) for n in row[3:].split()] for row in second.splitlines()[1:]])[:, 10:]
    idx = torch.tensor(transformer.encode("KING ", itos)).long()[None]
    block, x = model.blocks[0], model.token_embedding_table(idx) + model.position_embedding_table.weight[:5]
    q, k, v = (part[0, :, :8] for part in block.sa.qkv(block.ln1(x)).split(48, dim=-1))
    expected = (q @ k.T / 8**0.5).masked_fill(torch.ones(5, 5).triu(1) == 1, float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(weights, expected, atol=0.006, rtol=0)
    probs = model(idx)[0][0, -1].softmax(dim=-1)
    assert last.startswith(f"next: {itos[probs.argmax()]!r} {probs.max():.1%}") and last.count("%") == 5


def test_attention_is_drawn_and_the_model_computes_the_same(trained, drawn):
    (model, itos), names = trained, show("What does attention look at?")
    maps, images = names["maps"], [ax.images[0].get_array() for ax in drawn["attention.png"].axes]
    assert np.array_equal(images[0], maps[0][0]) and np.array_equal(images[5], maps[5][3]) and len(images) == 6
    torch.testing.assert_close(torch.stack(maps).tril().sum(dim=-1), torch.ones(6, 6, len(names["text"])))
    idx = torch.tensor(transformer.encode(names["text"], itos)).long()[None]
    watched, transformer.attention = model(idx)[0], names["attention"]
    assert torch.equal(watched, model(idx)[0])


def test_parts_are_left_out_one_by_one(trained, capsys):
    names = show("Which parts does the model need?", "5_000", "500")
    out, proj = capsys.readouterr().out, names["model"].blocks[1].sa.proj
    table = [[float(n) for n in row.split()] for row in re.findall(r"block \d (.*)", out)]
    assert [len(row) for row in table] == [8] * 6 and names["loss_without"]() == names["whole"]  # all is back
    proj.register_forward_pre_hook(lambda _, x: x[0] * (torch.arange(48) // 8 != 2))
    assert names["loss_without"]() - names["whole"] == pytest.approx(table[1][2], abs=1e-4)  # block 2, head 3
    windows, shown = torch.from_numpy(names["val_data"]).long().unfold(0, 65, 200), out.splitlines()[-1]
    for n in 1, 2, 4, 8, 16, 32, 64:
        loss = torch.nn.functional.cross_entropy(trained[0](windows[:, -n - 1:-1])[0][:, -1], windows[:, -1])
        assert abs(float(re.findall(rf" {n}: ([\d.]+)", shown)[0]) - loss) < 0.006


def test_an_induction_head_would_be_found(trained, monkeypatch, capsys):
    def attention(q, k, v, mask, *more):  # head 2: what followed 32 positions ago; head 5: the character before
        weights = mask.softmax(dim=-1).repeat(6, 1, 1)
        weights[1, 31:], weights[4, 1:] = torch.eye(64)[:33], torch.eye(64)[:63]
        return weights @ v

    monkeypatch.setattr(transformer, "attention", attention)
    show("Is there an induction head?")
    even, *rows = re.findall(r"(?:even spread:|block \d) (.*)", capsys.readouterr().out)
    row = [even, "100.0%", even, even, "0.0%", even, even, "0.0%", even, even, "100.0%", even]
    assert [line.split() for line in rows] == [row] * 6


def test_letters_are_drawn_and_capitals_find_their_own(trained, drawn, capsys):
    model, itos = trained
    pairs = [c + ("y" if c == "X" else c.lower()) for c in itos if c.isupper()]  # but X is like y
    table = model.token_embedding_table.weight.data
    for capital, small in pairs:
        table[itos.index(capital)] = table[itos.index(small)] + 0.1 * torch.randn(48)
    save(model, itos)
    show("What has it learned about letters?")
    assert capsys.readouterr().out.split() == pairs
    texts = [text.get_text() for ax in drawn["letters.png"].axes for text in ax.texts]
    assert len(texts) == 2 * len(set(texts)) and {c for c, _ in pairs} | {"¶"} < set(texts)
