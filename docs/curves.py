"""
Draws the curves of one or several runs of transformer.py into one picture. It needs matplotlib.

    python docs/curves.py out/transformer out/other --bigram 2.49 --out curves.png
"""
import argparse
import math

import numpy as np
import torch
from matplotlib.figure import Figure


def main(argv=None):
    parser = argparse.ArgumentParser("curves.py", "python docs/curves.py FOLDER [FOLDER ...] [options]")
    parser.add_argument("folders", nargs="+", help="folders of runs, with log.csv and model.pt")
    parser.add_argument("--bigram", type=float, metavar="LOSS", help="validation loss of bigram.py, drawn as a line")
    parser.add_argument("--out", metavar="FILE", default="curves.png", help="default: %(default)s")
    args, lines = parser.parse_args(argv), {}
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    norms = rates.twinx()
    for i, folder in enumerate(args.folders):
        try:
            log = np.atleast_1d(np.genfromtxt(f"{folder}/log.csv", delimiter=",", names=True))
            vocab_size = len(torch.load(f"{folder}/model.pt", "cpu", weights_only=True)["itos"])
        except OSError:
            parser.exit(2, f"curves.py: {folder} is not a run: it needs log.csv and model.pt\n")
        losses.plot(log["step"], log["train_loss"], "--", color=f"C{i}", label=f"{folder}: training")
        losses.plot(log["step"], log["val_loss"], ".-", color=f"C{i}", label=f"{folder}: validation")
        rates.plot(log["step"], log["learning_rate"], "-", color=f"C{i}")
        after = log[log["step"] > 0]  # step 0 has no gradient yet
        norms.plot(after["step"], after["grad_norm"], ":", color=f"C{i}")
        lines[math.log(vocab_size)] = f"uniform guessing, ln {vocab_size} = {math.log(vocab_size):.2f}"
    if args.bigram is not None:
        lines[args.bigram] = f"bigram.py, {args.bigram:.2f}"
    for loss, label in lines.items():
        losses.axhline(loss, color="gray", linewidth=1)
        losses.text(0.99, loss, label, transform=losses.get_yaxis_transform(), ha="right", va="bottom")
    losses.set(ylabel="loss (nats per character)")
    rates.set(xlabel="training steps", ylabel="learning rate (line)", ylim=0)
    norms.set(ylabel="gradient norm (dots)", ylim=0)
    losses.grid(alpha=0.3)
    rates.grid(alpha=0.3)
    losses.legend(loc="upper right", bbox_to_anchor=(1, 0.88))
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
