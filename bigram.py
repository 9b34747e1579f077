"""
A bigram language model: one table that says, for every character, which character comes next.

It is the baseline of Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out",
and knows nothing but the last character. transformer.py is the model that looks further back.

    python bigram.py                  # learn from input.txt, then write some text
    python bigram.py --data my.txt    # learn from another text
"""
import argparse
import re
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------
# Hyperparameters: what can be chosen? These five are flags (--max-iters 500); the rest is fixed.

@dataclass
class Config:
    data: str = ""  # UTF-8 text; default data/tinyshakespeare/input.txt if fetched, else input.txt
    device: str = ""  # cuda, cpu or mps; default cuda where there is one, else cpu
    seed: int = 1337  # the same seed on the same machine gives the same run
    max_iters: int = 2000  # training steps
    out_dir: str = "out/bigram"  # folder for model.pt, log.csv and sample.txt

batch_size = 128      # how many windows of text in one step
block_size = 8        # characters in a window; a bigram looks at one, more only saves work
learning_rate = 0.1   # at the first step; falls to 0 in a straight line
eval_interval = 400   # steps between two lines of losses


class UserError(ValueError):
    """Something the user can put right: shown as one line, then exit status 2."""

# ---------------------------------------------------------------------------------------------
# Data: how does text become integers?

def find_data(path):
    """The text to learn from: `path` if given, else the fetched or the built-in one beside this script."""
    here = Path(__file__).resolve().parent
    fetched = here / "data" / "tinyshakespeare" / "input.txt"
    return Path(path) if path else fetched if fetched.exists() else here / "input.txt"


def read_pieces(path):
    """Yields a text file in pieces of up to a million characters, so that a large one takes little memory.

    A byte-order mark is dropped, and the line ends \\r\\n and \\r become \\n.
    Raises OSError if the file cannot be read and UserError if it is not UTF-8.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            while piece := file.read(1 << 20):
                yield piece
        except UnicodeDecodeError as error:
            byte = file.buffer.tell() - len(error.object) + error.start
            raise UserError(f"{path} is not UTF-8 text: see byte {byte}") from None


def code_points(text):
    """The Unicode code point of each character: a (len(text),) array, without a Python loop."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def encode(text, itos):
    """Text to integers, (len(text),) int32: each character's place in itos, the vocabulary.

    Raises UserError for a character that the vocabulary lacks.
    """
    stoi = np.full(sys.maxunicode + 1, -1, dtype=np.int32)  # from code point to integer
    stoi[code_points(itos)] = np.arange(len(itos))
    ids = stoi[code_points(text)]
    if ids.min(initial=0) < 0:
        raise UserError(f"the character {text[ids.argmin()]!r} is not in the model's vocabulary")
    return ids


def decode(ids, itos):
    """Integers to text: the inverse of encode."""
    return "".join(itos[i] for i in ids)


def load_data(path, block_size):
    """Reads a text and returns (train_data, val_data, itos): integers, and the vocabulary.

    itos is a string of the text's distinct characters, sorted. The integers have the smallest type
    that holds them; the first 90 % are for training. Raises UserError if the validation part would
    not hold one window of block_size characters and the character after it.
    """
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for piece in read_pieces(path):
        seen[code_points(piece)] = True
    itos = "".join(map(chr, np.flatnonzero(seen)))
    dtype = np.min_scalar_type(max(len(itos) - 1, 0))
    pieces = [encode(piece, itos).astype(dtype) for piece in read_pieces(path)]
    data = np.concatenate(pieces or [np.zeros(0, dtype)])
    n = int(0.9 * len(data))  # first 90% will be train, rest val
    if len(data) - n <= block_size:
        raise UserError(f"the text {path} is too short ({len(data)} characters): windows of "
                        f"{block_size} need at least {10 * (block_size + 1)}")
    return data[:n], data[n:], itos


def get_batch(data, step, seed, batch_size, block_size):
    """Random windows x and the same windows one character later y, both (B, T).

    They depend on (seed, step) alone, so any batch can be had again without those before it.
    """
    starts = np.random.default_rng((seed, step)).integers(len(data) - block_size, size=batch_size)
    windows = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]

# ---------------------------------------------------------------------------------------------
# Model: given a character, how likely is each next one?

class BigramLanguageModel(nn.Module):
    """A table of logits with a row for each character: vocab_size x vocab_size parameters."""

    def __init__(self, vocab_size):
        super().__init__()
        # each token directly reads off the logits for the next token from a lookup table
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None):
        """idx and targets are (B, T) integers; returns logits (B, T, C) and the mean loss in nats, or None."""
        logits = self.token_embedding_table(idx)  # (B, T, C)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Returns idx, (B, T) integers, with max_new_tokens sampled ones appended: (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -1:])  # (B, 1, C): only the last character counts
            probs = F.softmax(logits[:, -1], dim=-1)  # (B, C)
            idx_next = torch.multinomial(probs, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, idx_next), dim=1)  # (B, T+1)
        return idx

# ---------------------------------------------------------------------------------------------
# Evaluation: how good is a table, over a whole text, and how good could any table be?

def count_pairs(data, vocab_size):
    """How often each character follows each other one: (C, C) float64, row = first, column = next."""
    counts = np.zeros(vocab_size**2, dtype=np.int64)
    for i in range(0, len(data) - 1, 1 << 20):  # in pieces, as a large text would take much memory
        part = data[i:i + (1 << 20) + 1].astype(np.int64)
        counts += np.bincount(part[:-1] * vocab_size + part[1:], minlength=vocab_size**2)
    return torch.from_numpy(counts).double().view(vocab_size, vocab_size)


def bigram_loss(logits, counts):
    """The loss of a (C, C) table of logits on the text that `counts` was made from: exact, no sampling."""
    return -(counts * F.log_softmax(logits.double(), dim=-1)).sum().item() / counts.sum().item()

# ---------------------------------------------------------------------------------------------
# Training, then sampling: what does the table learn, and what does it write?

def pick_device(name):
    """`name`, or the best device there is. Raises UserError for one that this machine lacks."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name and not there.get(name):
        raise UserError(f"--device {name}: not on this machine, which has "
                        + ", ".join(device for device in there if there[device]))
    return name or ("cuda" if there["cuda"] else "cpu")


def train(config):
    device, path = pick_device(config.device), find_data(config.data)
    train_data, val_data, itos = load_data(path, block_size)
    print(f"text {path}: {len(train_data) + len(val_data):,} characters, {len(itos)} distinct")
    vocab_size = len(itos)
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)
    model = BigramLanguageModel(vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    table = model.token_embedding_table.weight  # (C, C), all there is to train
    print(f"device {device}, {table.numel():,} parameters, {config.max_iters:,} steps")
    train_counts, val_counts = count_pairs(train_data, vocab_size), count_pairs(val_data, vocab_size)

    log = ["step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm"]
    start = time.perf_counter()
    for step in range(config.max_iters):
        lr = optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / config.max_iters)
        xb, yb = get_batch(train_data, step, config.seed, batch_size, block_size)
        logits, loss = model(xb.to(device), yb.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if (step + 1) % eval_interval == 0 or step + 1 == config.max_iters:
            seconds = time.perf_counter() - start
            train_loss = bigram_loss(table.detach().cpu(), train_counts)
            val_loss = bigram_loss(table.detach().cpu(), val_counts)
            print(f"step {step + 1}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            log.append(f"{step + 1},{(step + 1) * batch_size * block_size},{seconds:.2f},"
                       f"{train_loss:.4f},{val_loss:.4f},{lr:.3g},{table.grad.norm():.3g}")

    # The best table of all holds the logarithms of the counted pairs. (For the validation text one
    # is added to every count, or a pair that the training text lacks would be impossible.)
    best_train = bigram_loss(train_counts.clamp(min=1e-9).log(), train_counts)
    best_val = bigram_loss((train_counts + 1).log(), val_counts)
    print(f"by counting: train loss {best_train:.4f}, val loss {best_val:.4f}, the floor for any bigram\n")

    # generate from the model
    context = torch.tensor([[max(itos.find("\n"), 0)]], device=device)
    sample = decode(model.generate(context, max_new_tokens=500)[0, 1:].tolist(), itos)
    print(sample)

    for name in ("model.pt", "log.csv", "sample.txt"):
        if (out_dir / name).exists():  # the run before this one stays, as *.old
            (out_dir / name).replace(out_dir / f"{name}.old")
    with open(out_dir / "model.pt", "wb") as file:
        torch.save({"model": model.state_dict(), "itos": itos}, file)
    (out_dir / "log.csv").write_text("\n".join(log) + "\n")
    (out_dir / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\nsaved in {out_dir}: model.pt, log.csv, sample.txt")

# ---------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, where argparse would print the usage too
        raise UserError(f"{message} (see --help)")


def add_flags(parser):
    """Makes a flag of every field of Config, with the comment behind it, in this file, as help."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text("utf-8"), re.M))
    for field in fields(Config):
        default = f" (default {field.default})" if field.default != "" else ""
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=argparse.SUPPRESS,
                            metavar=field.type.__name__.upper(), help=comments[field.name] + default)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # for terminals that lack some characters
    try:
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        add_flags(parser)
        config = Config(**vars(parser.parse_args(argv)))
        if not 0 <= config.seed <= 2**63:
            raise UserError(f"--seed must be from 0 to {2**63}, not {config.seed}")
        if not 1 <= config.max_iters <= 10**9:
            raise UserError(f"--max-iters must be from 1 to {10**9}, not {config.max_iters}")
        train(config)
        return 0
    except (UserError, OSError) as error:
        print(f"bigram.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
