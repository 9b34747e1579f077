"""
A bigram language model: one table that says, for every character, which character comes next.

It is the baseline of Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out",
and knows nothing but the last character. transformer.py is the model that looks further back.

    python bigram.py --data my.txt    # without --data: Tiny Shakespeare if fetched, or input.txt
"""
import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
FETCHED = HERE / "data/tinyshakespeare/input.txt"  # the lecture's text, once it is there
TEXT = FETCHED if FETCHED.exists() else HERE / "input.txt"

batch_size = 128     # how many windows of text in one step
block_size = 8       # characters in a window; a bigram needs only one, more make larger batches
learning_rate = 0.1  # at the first step; falls to 0 in a straight line
eval_interval = 400  # steps between two lines of losses


class UserError(ValueError):
    """Something the user can put right: shown as one line, then exit status 2."""


# Data: how does text become integers?

def encode(text, itos):
    """Text to integers, (len(text),) int32: each character's place in itos, the vocabulary."""
    # Faster than a loop over the text: translate writes chr(1) for the character itos[1], and so
    # on; UTF-32 stores chr(1) as the integer 1, in 4 bytes.
    stoi = {ord(c): i for i, c in enumerate(itos)}
    return np.frombuffer(text.translate(stoi).encode("utf-32-le", "surrogatepass"), dtype="<i4")


def decode(ids, itos):
    return "".join(itos[i] for i in ids)


def load_data(path, block_size):
    """Reads a text: (train_data, val_data, itos), integers and a string, the vocabulary."""
    if not Path(path).exists():
        raise UserError(f"there is no text {path}: give one with --data FILE")
    text = Path(path).read_text(encoding="utf-8-sig")  # line ends become \n
    nuls = text[::2].count("\0"), text[1::2].count("\0")  # UTF-16 has them at every other place
    if min(nuls) == 0 and max(nuls) > 2 + len(text) / 50:
        raise UserError(f"{path} is UTF-16: save it as UTF-8")
    itos = "".join(sorted(set(text)))
    data = encode(text, itos)
    n = int(0.9 * len(data))  # first 90% will be train, rest val
    if len(data) - n <= block_size:
        raise UserError(f"the text {path} is too short ({len(data)} characters): windows of "
                        f"{block_size} need at least {10 * block_size + 1}")
    return data[:n], data[n:], itos


def get_batch(data, step, seed, batch_size, block_size):
    """Windows x at random places, by (seed, step) alone, and y, one character later: (B, T)."""
    starts = np.random.default_rng((seed, step)).integers(len(data) - block_size, size=batch_size)
    windows = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)]).long()  # (B, T+1)
    return windows[:, :-1], windows[:, 1:]


# Model: given a character, how likely is each next one?

class BigramLanguageModel(nn.Module):
    """A table of logits with a row for each character: vocab_size x vocab_size parameters."""

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
        """Returns idx, (B, T) integers, with max_new_tokens sampled ones appended."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -1:])  # (B, 1, C): only the last character counts
            probs = F.softmax(logits[:, -1], dim=-1)  # (B, C)
            idx_next = torch.multinomial(probs, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T+1)
        return idx


# Training, then sampling: what does the table learn, and what does it write?

def exact_loss(table, data):
    """The mean loss in nats of a (C, C) table of logits over all pairs of neighbours in data."""
    return -F.log_softmax(table, dim=-1)[data[:-1], data[1:]].mean().item()


def train(path, device, seed, max_iters):
    *splits, itos = load_data(path, block_size)
    C = len(itos)
    print(f"text {path}: {sum(map(len, splits)):,} characters, {C} distinct\n"
          f"device {device}, {C * C:,} parameters, {max_iters:,} steps", flush=True)
    torch.set_num_threads(1)  # there is little to do: a second thread would wait for the first
    torch.manual_seed(seed)
    model = BigramLanguageModel(C).to(device)
    table = model.token_embedding_table.weight.data  # (C, C); changes as the model learns
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    tensors = [torch.from_numpy(data.astype(np.int64)).to(device) for data in splits]

    began = shown = time.perf_counter()
    for step in range(1, max_iters + 1):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / max_iters)
        xb, yb = get_batch(splits[0], step, seed, batch_size, block_size)
        logits, loss = model(xb.to(device), yb.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % eval_interval == 0 or step == max_iters:
            losses = [exact_loss(table, ids) for ids in tensors]
            print("step {}: train loss {:.4f}, val loss {:.4f}".format(step, *losses), flush=True)
        elif time.perf_counter() - shown > 4:  # a large table takes its time
            shown = time.perf_counter()
            left = (shown - began) / step * (max_iters - step)
            print(f"step {step}, about {left:.0f} s left", flush=True)

    # Counting the pairs gives such a table, too: the logarithms of counts are logits, as softmax
    # makes shares of them. (One is added to each count, for the pairs that are not in the text.)
    pairs = tensors[0][:-1] * C + tensors[0][1:]  # each pair as one integer
    counts = torch.bincount(pairs, minlength=C * C).view(C, C) + 1
    losses = [exact_loss(counts.log(), ids) for ids in tensors]
    print("counted instead: train loss {:.4f}, val loss {:.4f}\n".format(*losses))
    context = torch.tensor([[max(itos.find("\n"), 0)]], device=device)
    print(decode(model.generate(context, max_new_tokens=500)[0, 1:], itos))


def main(argv=None):
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    devices = ["cuda"] * cuda + ["cpu"] + ["mps"] * mps
    parser = argparse.ArgumentParser(
        prog="bigram.py", description=__doc__.split("\n")[1], usage=argparse.SUPPRESS)
    parser.add_argument("--data", default=str(TEXT), help="UTF-8 text to learn from")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same run")
    parser.add_argument("--max-iters", type=int, default=2000, help="training steps")
    args = parser.parse_args(argv)
    if args.data == "" or not 0 <= args.seed <= 1e9 or not 1 <= args.max_iters <= 1e9:
        parser.error("--data must not be empty, --seed 0 to 1e9, --max-iters 1 to 1e9")
    if hasattr(sys.stdout, "reconfigure"):  # UTF-8 in files and pipes; ? for what a terminal lacks
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    try:
        train(args.data, args.device, args.seed, args.max_iters)
    except BrokenPipeError:  # whoever reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeDecodeError as error:
        parser.error(f"{args.data} is not UTF-8 text: see byte {error.start}; "
                     "save it as UTF-8, or unpack it")
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or 'cannot print'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if "MemoryError" not in repr(error) and "allocate" not in repr(error):
            raise
        parser.error("out of memory: the table has a row and a column for each distinct character")


if __name__ == "__main__":
    main()
