"""
Draws the pictures of docs/learned.md and prints its figures, from the files of a run. It needs matplotlib.

    python docs/pictures.py curves out/transformer out/other   # the losses of one or several runs
    python docs/pictures.py parts out/transformer              # which parts, and how much context, the model needs
    python docs/pictures.py heads out/transformer              # which heads look one character back, which copy
    python docs/pictures.py attention out/transformer          # what four heads look at
    python docs/pictures.py letters out/transformer            # which characters are similar for the model
"""
import argparse
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformer  # noqa: E402

SHOWN = [(1, 5, "the character before"), (1, 6, "two characters before"),  # block, head, what the map shows
         (3, 2, "line ends"), (5, 4, "the speaker's name")]
SPEECH = "KING:\nMy dog. Good dog,\n\nPAGE:\nGod"


def load(folder, data):
    """The best model of a run, its vocabulary, and the validation text as integers."""
    model, checkpoint = transformer.load_checkpoint(Path(folder) / "model.pt")
    _, val_data, itos = transformer.load_data(data, model.config.block_size)
    if itos != checkpoint["itos"]:
        raise transformer.UserError(f"the model of {folder} was not trained on {data}: set --data")
    model.config.dtype = "float32"  # so that the figures are the same on every machine
    return model.eval(), itos, val_data


def curves(folders, bigram):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    for i, folder in enumerate(folders):
        log = np.atleast_1d(np.genfromtxt(f"{folder}/log.csv", delimiter=",", names=True))
        ax.plot(log["step"], log["train_loss"], "--", color=f"C{i}", label=f"{folder}: training")
        ax.plot(log["step"], log["val_loss"], ".-", color=f"C{i}", label=f"{folder}: validation")
    vocab_size = len(transformer.load_checkpoint(Path(folders[0]) / "model.pt")[1]["itos"])
    lines = {math.log(vocab_size): f"guessing, ln {vocab_size} = {math.log(vocab_size):.2f}"}
    if bigram:
        lines[bigram] = f"bigram.py, {bigram:.2f}"
    for loss, label in lines.items():
        ax.axhline(loss, color="gray", linewidth=1)
        ax.text(0.99, loss, label, transform=ax.get_yaxis_transform(), ha="right", va="bottom")
    ax.set(xlabel="training steps", ylabel="loss (nats per character)", ylim=(None, max(lines) + 0.3))
    ax.grid(alpha=0.3)
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.88))
    return figure


@contextmanager
def without(*modules):
    """As long as it lasts, the modules add nothing to the residual stream."""
    handles = [module.register_forward_hook(lambda module, x, out: torch.zeros_like(out)) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def parts(model, val_data, n_chars=20_000):
    """Prints what the loss on n_chars characters gains without each part, and the loss by length of context."""
    def loss():
        return transformer.estimate_loss(model, val_data, min(n_chars, len(val_data)))
    whole = loss()
    print(f"whole model: {whole:.4f}")
    with without(*(block.sa for block in model.blocks[1:])):
        print(f"without attention in blocks 2 to {len(model.blocks)}: {loss() - whole:+.4f}")
    for i, block in enumerate(model.blocks):
        for name, part in (("attention", block.sa), ("feed-forward", block.ffwd)):
            with without(part):
                print(f"without {name} in block {i + 1}: {loss() - whole:+.4f}", flush=True)
    T = model.config.block_size
    windows = torch.from_numpy(val_data).long().unfold(0, T + 1, 200)  # to predict the last character of each
    print(f"loss by context, {len(windows)} predictions:")
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
    try:
        with torch.no_grad():
            logits, _ = model(idx)
    finally:
        transformer.attention = attention
    return weights, logits


def heads(model, val_data):
    """Each head's mean weight on the character before, and in a passage read twice on what followed the first time."""
    n = model.config.block_size // 2
    passages = torch.from_numpy(val_data).long().unfold(0, n, len(val_data) // 40)[:40]  # (40, n)
    for name, first in (("another", passages.roll(1, 0)), ("the same", passages)):
        idx = torch.cat((first, passages), dim=1)  # (40, 2 n)
        weights, logits = attention_weights(model, idx)
        loss = F.cross_entropy(logits[:, n:-1].flatten(0, 1), idx[:, n + 1:].flatten())
        print(f"loss of a passage after {name} passage: {loss:.2f}")
    print(f"an even spread of attention: {(1 / torch.arange(n + 1, 2 * n + 1)).mean():.1%}")
    for name, offset in (("the character before", -1), ("what followed the first time", 1 - n)):
        print(f"weight on {name}, head 1 to {model.config.n_head}:")
        for i, w in enumerate(weights):
            means = w.diagonal(offset, 2, 3)[..., -n:].mean(dim=(0, 2))  # (H,)
            print(f"block {i + 1}", *(f"{mean:6.1%}" for mean in means.tolist()))


def attention(model, itos, shown, text):
    weights, _ = attention_weights(model, torch.from_numpy(transformer.encode(text, itos)).long()[None])
    figure, marks = Figure(figsize=(9, 9), layout="constrained"), text.replace("\n", "¶")
    for ax, (block, head, title) in zip(figure.subplots(2, 2).flat, shown):
        ax.imshow(weights[block - 1][0, head - 1].numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set(xticks=range(len(text)), yticks=range(len(text)), xticklabels=marks, yticklabels=marks)
        ax.tick_params(length=0, labelsize=8)
        ax.set_title(f"block {block}, head {head}: {title}")
    return figure


def letters(model, itos):
    """The token table on its first two principal components; prints each capital with the most similar small letter."""
    chosen = [i for i, c in enumerate(itos) if c.isalpha() or c in " \n.,;:!?'-"]
    table, chars = model.token_embedding_table.weight.detach()[chosen], [itos[i] for i in chosen]
    table = table - table.mean(dim=0)  # (number of characters, C)
    similarity = F.normalize(table) @ F.normalize(table).T  # the cosine of the angle between two rows
    small = [i for i, c in enumerate(chars) if c.islower()]
    print(*(c + chars[small[similarity[i, small].argmax()]] for i, c in enumerate(chars) if c.isupper()))
    places = table @ torch.linalg.svd(table, full_matrices=False).Vh[:2].T
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax = figure.subplots()
    for c, place in zip(chars, places.tolist()):
        kind = 3 if not c.isalpha() else 2 if c.isupper() else 0 if c in "aeiou" else 1
        ax.plot(*place, ".", color="white")  # so that the axes cover all letters
        ax.text(*place, {"\n": "¶", " ": "␣"}.get(c, c), color=f"C{kind}", size=14 if c in ".,;:'-" else 11,
                ha="center", va="center")
    ax.set_title("small vowels blue, small consonants orange, capitals green, punctuation red", fontsize=10)
    ax.set(xlabel="component 1", ylabel="component 2")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curves", "parts", "heads", "attention", "letters"])
    parser.add_argument("folders", nargs="+", help="folders of runs; all but curves take one")
    parser.add_argument("--data", default=transformer.TEXT, help="the text of the run")
    parser.add_argument("--bigram", type=float, metavar="LOSS", help="validation loss of bigram.py, drawn as a line")
    parser.add_argument("--out", metavar="FILE", help="default: curves.png and so on")
    args, figure = parser.parse_args(argv), None
    try:
        if args.what == "curves":
            figure = curves(args.folders, args.bigram)
        else:
            model, itos, val_data = load(args.folders[0], args.data)
            if args.what == "parts":
                parts(model, val_data)
            elif args.what == "heads":
                heads(model, val_data)
            else:
                figure = attention(model, itos, SHOWN, SPEECH) if args.what == "attention" else letters(model, itos)
    except (OSError, transformer.UserError) as error:
        parser.error(str(error))
    if figure:
        figure.savefig(args.out or f"{args.what}.png", dpi=100)


if __name__ == "__main__":
    main()
