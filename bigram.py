"""
A bigram language model: for each character, how likely is every character to come next?
It is the baseline of Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out".

    python bigram.py --data my.txt    # by default the lecture's text if downloaded, or input.txt
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
FETCHED = HERE / "data/tinyshakespeare/input.txt"  # the lecture's text: see download.py there
TEXT = FETCHED if FETCHED.exists() else HERE / "input.txt"

batch_size = 128  # sequences per training step
block_size = 8  # characters per sequence
max_iters = 2000  # training steps
eval_interval = 400  # steps between evaluations
learning_rate = 0.1  # at the first step; it falls linearly to 0
seed = 1337  # the same seed gives the same run
device = "cuda" if torch.cuda.is_available() else "cpu"


class UserError(Exception):
    """Something the user can correct: shown as one line, without a traceback."""


def encode(text, itos):
    """Text to integers: itos[i] is character number i. An unknown character is a KeyError."""
    stoi = {c: i for i, c in enumerate(itos)}
    return np.fromiter((stoi[c] for c in text), np.int32, len(text))


def decode(ids, itos):  # integers to text
    return "".join(itos[i] for i in ids)


def load_data(path, block_size):
    """Returns train_data and val_data, arrays of integers, and the vocabulary itos, a string."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text ({type(error).__name__}): see --data")
    itos = "".join(sorted(set(text)))
    data = encode(text, itos)
    n = int(0.9 * len(data))  # first 90% will be train, rest val
    if len(data) - n <= block_size:
        raise UserError(f"{path} is too short: it needs {10 * block_size + 1} characters")
    return data[:n], data[n:], itos


def get_batch(data, step, seed, batch_size, block_size):
    """Random inputs x and targets y (x shifted by one), (B, T). Depends only on seed and step."""
    starts = np.random.default_rng((seed, step)).integers(len(data) - block_size, size=batch_size)
    positions = starts[:, None] + np.arange(block_size + 1)  # (B, T+1)
    windows = torch.from_numpy(data[positions]).long()
    return windows[:, :-1], windows[:, 1:]


class BigramLanguageModel(nn.Module):
    """Row i of its table holds the logits of the character that follows character i."""

    def __init__(self, vocab_size):
        super().__init__()
        # each token directly reads off the logits for the next token from a lookup table
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None):
        """idx, targets (B, T) integers -> logits (B, T, C), mean loss in nats (or None)."""
        logits = self.token_embedding_table(idx)  # (B, T, C)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Returns idx, (B, T) integers, with max_new_tokens sampled tokens appended."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -1:])  # (B, 1, C): only the last character matters
            probs = F.softmax(logits[:, -1], dim=-1)  # (B, C)
            idx_next = torch.multinomial(probs, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T+1)
        return idx


def exact_loss(table, data):
    """Mean loss in nats of a (C, C) table of logits over all pairs of neighbors in data."""
    return -F.log_softmax(table, dim=-1)[data[:-1], data[1:]].mean().item()


def train(path):
    train_data, val_data, itos = load_data(path, block_size)
    vocab_size = len(itos)
    print(f"{path}: {len(train_data) + len(val_data):,} characters, {vocab_size} distinct")
    torch.manual_seed(seed)
    model = BigramLanguageModel(vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    splits = [torch.from_numpy(data).long().to(device) for data in (train_data, val_data)]
    for step in range(max_iters + 1):  # the last one has a learning rate of 0
        if step % eval_interval == 0 or step == max_iters:
            losses = [exact_loss(model.token_embedding_table.weight.data, data) for data in splits]
            print("step {}: train loss {:.4f}, val loss {:.4f}".format(step, *losses), flush=True)
        xb, yb = get_batch(train_data, step, seed, batch_size, block_size)
        logits, loss = model(xb.to(device), yb.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / max_iters)
        optimizer.step()

    # Counting gives the same kind of table: softmax(log counts) is just the normalized counts.
    pairs = splits[0][:-1] * vocab_size + splits[0][1:]  # each pair as one integer
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size)
    losses = [exact_loss((counts + 1).log(), data) for data in splits]  # + 1: log 0 is -inf
    print("by counting: train loss {:.4f}, val loss {:.4f}\n".format(*losses))
    context = torch.zeros((1, 1), dtype=torch.long, device=device)
    print(decode(model.generate(context, max_new_tokens=500)[0, 1:], itos))


def main(argv=None):
    parser = argparse.ArgumentParser("bigram.py", "python bigram.py [--data FILE]")
    parser.add_argument("--data", default=TEXT, help="text to learn from, UTF-8")
    try:
        train(parser.parse_args(argv).data)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as after "| head": send the rest nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, nor under pythonw
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main())
