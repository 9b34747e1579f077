"""
Draws the pictures of docs/learned.md and prints its figures, from the files of runs. It needs matplotlib.

    python docs/pictures.py curves out/transformer out/other   # the losses of one or several runs
    python docs/pictures.py scaling out/192 out/transformer    # the final losses of models of several sizes
    python docs/pictures.py gradients out/transformer          # how strong each block's gradient is at the start
    python docs/pictures.py parts out/transformer              # which parts, and how much context, the model needs
    python docs/pictures.py heads out/transformer              # which heads look at the last characters, which copy
    python docs/pictures.py attention out/transformer          # what four heads look at
    python docs/pictures.py letters out/transformer            # which characters are similar for the model
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer  # noqa: E402

SHOWN = [(1, 5, "the character before"), (1, 1, "two characters before"),  # block, head, what the map shows
         (2, 3, "the last few spaces"), (3, 2, "line ends")]
SPEECH = "KING:\nMy dog. Good dog,\n\nPAGE:\nGod"


def load(folder, data):
    """The best model of a run, its vocabulary, and the two parts of the text as integers."""
    model, checkpoint = transformer.load_checkpoint(Path(folder) / "model.pt")
    train_data, val_data, itos = transformer.load_data(data, model.config.block_size)
    if itos != checkpoint["itos"]:
        raise transformer.UserError(f"the model of {folder} was not trained on {data}: set --data")
    model.config.dtype = "float32"  # so that the figures are the same on every machine
    return model.eval(), itos, train_data, val_data


def axes(**labels):
    ax = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    ax.set(**labels)
    ax.grid(alpha=0.3)
    return ax


def curves(folders, data):
    ax = axes(xlabel="training steps", ylabel="loss (nats per character)")
    for i, folder in enumerate(folders):
        log = np.atleast_1d(np.genfromtxt(f"{folder}/log.csv", delimiter=",", names=True))
        ax.plot(log["step"], log["train_loss"], "--", color=f"C{i}", label=f"{folder}: training")
        ax.plot(log["step"], log["val_loss"], ".-", color=f"C{i}", label=f"{folder}: validation")
    ax.legend()
    return ax.figure


def scaling(folders, data):
    ax = axes(xlabel="parameters without embedding tables", ylabel="validation loss", xscale="log")
    ax.margins(0.2)
    for folder in folders:
        model, _, *splits = load(folder, data)
        train_loss, val_loss = (transformer.estimate_loss(model, split, len(splits[1])) for split in splits)
        n = sum(p.numel() for name, p in model.named_parameters() if "embedding_table" not in name)
        print(f"{folder}: {n:,} parameters without tables, losses {train_loss:.4f} and {val_loss:.4f}", flush=True)
        ax.plot(n, val_loss, "o", color="C0")
        ax.annotate(f"{model.config.n_embd} channels", (n, val_loss), (6, 6), textcoords="offset points")
    return ax.figure


def gradients(folders, data):
    """Of a model like that of the run, untrained: as GPT starts it, and as PyTorch would."""
    model, itos, train_data, _ = load(folders[0], data)
    ax = axes(xlabel="token table, then blocks", ylabel="gradient (root mean square)", yscale="log")
    for name, modules in (("GPT's start", []), ("PyTorch's start", model.modules())):
        torch.manual_seed(1337)
        model.__init__(model.config, len(itos))
        for module in modules:
            if module is not model.lm_head and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        loss = model(*transformer.get_batch(train_data, 0, 1337, 16, model.config.block_size))[1]
        loss.backward()
        parts = (model.token_embedding_table, *model.blocks)
        grads = [torch.cat([p.grad.flatten() for p in part.parameters()]) for part in parts]
        sizes = [grad.square().mean().sqrt().item() for grad in grads]
        print(f"{name}: loss {loss:.2f}, gradients", *(f"{size:.1e}" for size in sizes))
        ax.plot(["table", *map(str, range(1, len(sizes)))], sizes, ".-", label=name)
    ax.legend()
    return ax.figure


def parts(folders, data):
    """Prints what the loss on 20,000 characters gains without each part, and the loss by length of context."""
    model, _, _, val_data = load(folders[0], data)
    def loss_without(*modules):  # they add nothing to the residual stream
        handles = [module.register_forward_hook(lambda module, x, out: torch.zeros_like(out)) for module in modules]
        loss = transformer.estimate_loss(model, val_data, min(20_000, len(val_data)))
        for handle in handles:
            handle.remove()
        return loss
    whole = loss_without()
    print(f"whole model: {whole:.4f}")
    deep = loss_without(*(block.sa for block in model.blocks[1:]))
    print(f"without attention in blocks 2 to {len(model.blocks)}: {deep - whole:+.4f}")
    for i, block in enumerate(model.blocks):
        for name, part in (("attention", block.sa), ("feed-forward", block.ffwd)):
            print(f"without {name} in block {i + 1}: {loss_without(part) - whole:+.4f}", flush=True)
    T = model.config.block_size
    windows = torch.from_numpy(val_data).long().unfold(0, T + 1, 50)  # to predict the last character of each
    print(f"loss by context, {len(windows):,} predictions:")
    for n in (2**i for i in range(T.bit_length())):  # from the n characters before it
        with torch.no_grad():
            logits = torch.cat([model(w[:, T - n:T])[0][:, -1] for w in windows.split(32)])
        print(f"{n:4}: {F.cross_entropy(logits, windows[:, T]):.4f}", flush=True)


def attention_weights(model, idx):
    """The attention weights of each block, (B, H, T, T): with the identity matrix as v, the output is the weights."""
    attention, weights = transformer.attention, []
    def watched(q, k, v, mask, *dropout):
        weights.append(attention(q, k, torch.eye(k.size(2)).expand(*k.shape[:3], -1), mask))
        return attention(q, k, v, mask, *dropout)
    transformer.attention = watched
    with torch.no_grad():
        logits, _ = model(idx)
    transformer.attention = attention
    return weights, logits


def heads(folders, data):
    """Each head's mean weight on the last characters, and in a passage read twice on what followed the first time."""
    model, _, _, val_data = load(folders[0], data)
    n = model.config.block_size // 2
    passages = torch.from_numpy(val_data).long().unfold(0, n, len(val_data) // 40)[:40]  # (40, n)
    for name, first in (("another", passages.roll(1, 0)), ("the same", passages)):
        idx = torch.cat((first, passages), dim=1)  # (40, 2 n)
        weights, logits = attention_weights(model, idx)
        loss = F.cross_entropy(logits[:, n:-1].flatten(0, 1), idx[:, n + 1:].flatten())
        print(f"loss of a passage after {name} passage: {loss:.2f}")
    print(f"an even spread of attention: {(1 / torch.arange(n + 1, 2 * n + 1)).mean():.1%}")
    for name, offset in (("the character before", -1), ("the second character before", -2),
                         ("the third character before", -3), ("what followed the first time", 1 - n)):
        print(f"weight on {name}, head 1 to {model.config.n_head}:")
        for i, w in enumerate(weights):
            means = w.diagonal(offset, 2, 3)[..., -n:].mean(dim=(0, 2))  # (H,)
            print(f"block {i + 1}", *(f"{mean:6.1%}" for mean in means.tolist()))


def attention(folders, data):
    model, itos, *_ = load(folders[0], data)
    weights, _ = attention_weights(model, torch.from_numpy(transformer.encode(SPEECH, itos)).long()[None])
    figure, marks = Figure(figsize=(9, 9), layout="constrained"), SPEECH.replace("\n", "¶").replace(" ", "␣")
    for ax, (block, head, title) in zip(figure.subplots(2, 2).flat, SHOWN):
        ax.imshow(weights[block - 1][0, head - 1].numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set(xticks=range(len(marks)), yticks=range(len(marks)), xticklabels=marks, yticklabels=marks)
        ax.tick_params(length=0, labelsize=8)
        ax.set_title(f"block {block}, head {head}: {title}")
    return figure


def letters(folders, data):
    """The token table on its first two principal components; prints each capital with the most similar small letter."""
    model, itos, *_ = load(folders[0], data)
    chosen = [i for i, c in enumerate(itos) if c.isalpha() or c in " \n.,;:!?'-"]
    table, chars = model.token_embedding_table.weight.detach()[chosen], [itos[i] for i in chosen]
    table = table - table.mean(dim=0)  # (number of characters, C)
    similarity = F.normalize(table) @ F.normalize(table).T  # the cosine of the angle between two rows
    small = [i for i, c in enumerate(chars) if c.islower()]
    print(*(c + chars[small[similarity[i, small].argmax()]] for i, c in enumerate(chars) if c.isupper()))
    places = table @ torch.linalg.svd(table, full_matrices=False).Vh[:2].T
    ax = axes(xlabel="component 1", ylabel="component 2", title="small vowels are blue, capitals green")
    ax.plot(*places.T, ".", color="white")  # so that the axes cover all letters
    for c, place in zip(chars, places.tolist()):
        kind = 3 if not c.isalpha() else 2 if c.isupper() else 0 if c in "aeiou" else 1
        ax.text(*place, {"\n": "¶", " ": "␣"}.get(c, c), color=f"C{kind}", size=14 if c in ".,;:'-" else 11)
    return ax.figure


def main(argv=None):
    what = {f.__name__: f for f in (curves, scaling, gradients, parts, heads, attention, letters)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=what)
    parser.add_argument("folders", nargs="+", help="folders of runs; all but curves and scaling take one")
    parser.add_argument("--data", default=transformer.TEXT, help="the text of the run")
    parser.add_argument("--out", metavar="FILE", help="default: curves.png and so on")
    args = parser.parse_args(argv)
    try:
        figure = what[args.what](args.folders, args.data)
    except (OSError, transformer.UserError) as error:
        parser.error(str(error))
    if figure:
        figure.savefig(args.out or f"{args.what}.png", dpi=100)


if __name__ == "__main__":
    main()
