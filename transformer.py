"""
A GPT-2 small enough to train on a laptop: characters in, characters out, everything on one page.

It follows Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out", in its order
and with its names, and goes past it: the trained model is kept, a stopped run goes on where it
was, and each new character costs the work of one character instead of the whole context.

    python transformer.py                      # train for 20 minutes; two CPU cores are enough
    python transformer.py --prompt "ROMEO:"    # let the trained model write
    python transformer.py --resume             # go on after an interruption
"""
import argparse
import hashlib
import io
import math
import os
import shlex
import signal
import sys
import threading
import time
import timeit
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

# Hyperparameters: what can be chosen? Every field is a flag (n_layer is --n-layer). ----------

HERE = Path(__file__).resolve().parent
FETCHED = HERE / "data/tinyshakespeare/input.txt"  # the lecture's text, once it is there
TEXT = FETCHED if FETCHED.exists() else HERE / "input.txt"
CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
DEVICES = ["cuda"] * CUDA + ["cpu"] + ["mps"] * MPS  # the first is the default


def flag(default, help, low=1e-9, high=1e9, **more):  # limits; 1e-9: above 0
    return field(default=default, metadata={"help": help, "limits": (low, high), "more": more})


@dataclass
class Config:
    data: str = flag(str(TEXT), "UTF-8 text to learn from")
    out_dir: str = flag("out/transformer", "folder for the model, log.csv and sample.txt")
    device: str = flag(DEVICES[0], "where to compute", choices=DEVICES)
    precision: str = flag(None, "default: the faster one of the two", choices=("fp32", "bf16"))
    seed: int = flag(1337, "the same seed on the same machine gives the same run", 0)
    # the model
    n_layer: int = flag(6, "blocks, one after the other")
    n_head: int = flag(6, "attention heads in a block; must divide n_embd")
    n_embd: int = flag(384, "channels: the length of the vector that stands for a character")
    block_size: int = flag(256, "context: how many characters the model sees at once")
    dropout: float = flag(0.0, "fraction of activations zeroed, against overfitting", 0, 0.99)
    # training it
    batch_size: int = flag(4, "windows of block_size characters in a step")
    max_iters: int = flag(None, "training steps (default: as many as fit into the minutes)")
    minutes: float = flag(20.0, "how long the run takes, where max_iters is not given")
    grow_at: float = flag(0.85, "fraction of the steps that train a third of the blocks", 0, 0.99)
    eval_interval: int = flag(None, "steps between evaluations and saves (default: max_iters / 10)")
    eval_tokens: int = flag(None, "characters of each split used for one (default: by max_iters)")
    learning_rate: float = flag(1e-3, "the highest, after the warm-up; falls to 0 at max_iters")
    warmup_iters: int = flag(100, "steps in which the learning rate rises", 0)
    weight_decay: float = flag(0.1, "pull of the weight matrices towards zero (AdamW)", 0)
    beta2: float = flag(0.99, "AdamW's memory for squared gradients; higher is longer", 0, 0.999999)
    grad_clip: float = flag(1.0, "a gradient longer than this is scaled down to it")
    resume: bool = flag(False, "go on with the run in out_dir; max_iters may be raised")
    overwrite: bool = flag(False, "start anew where out_dir holds a run already")
    # letting it write
    prompt: str = flag(None, "write instead of training: how the text begins (--prompt=-x for -x)")
    prompt_file: str = flag(None, "a file with the text's beginning, which may have several lines")
    max_new_tokens: int = flag(500, "characters to add")
    temperature: float = flag(1.0, "0 takes the likeliest character; higher is more random", 0)
    top_k: int = flag(None, "choose among the k likeliest characters")
    top_p: float = flag(None, "or the likeliest that together have this probability", high=1)
    num_samples: int = flag(1, "how many texts")

# Which flags are for writing, and which for both; all others are for training.
WRITING = "prompt", "prompt_file", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p"
BOTH = "out_dir", "device", "seed"

# On a GPU steps are cheap: the text is seen many times, and dropout keeps it from being memorised.
CUDA_DEFAULTS = dict(batch_size=64, max_iters=2500, dropout=0.2, grow_at=0.0)


class UserError(ValueError):
    """Something the user can put right: shown as one line, then exit status 2."""


def require(condition, message):
    if not condition:
        raise UserError(message)

# Data: how does text become integers? --------------------------------------------------------

def encode(text, itos):
    """Text to integers, (len(text),) int32: places in itos. UserError: a character is not there."""
    unknown = min(set(text) - set(itos), default="")
    require(not unknown, f"the character {unknown!r} is not in the model's vocabulary")
    # Faster than a loop over the text: translate writes chr(1) for the character itos[1], and so
    # on; UTF-32 stores chr(1) as the integer 1, in 4 bytes.
    stoi = {ord(c): i for i, c in enumerate(itos)}
    return np.frombuffer(text.translate(stoi).encode("utf-32-le", "surrogatepass"), dtype="<i4")


def decode(ids, itos):
    """Integers to text: the inverse of encode."""
    return "".join(itos[i] for i in ids)


def load_data(path, block_size):
    """Reads a text: (train_data, val_data, itos), integers and the string of distinct characters.

    Raises OSError, UnicodeDecodeError, and UserError if the text is too short or UTF-16.
    """
    require(Path(path).exists(), f"there is no text {path}: give one with --data FILE")
    text = Path(path).read_text(encoding="utf-8-sig")  # line ends become \n
    nuls = text[::2].count("\0"), text[1::2].count("\0")  # UTF-16 has them at every other place
    require(min(nuls) > 0 or max(nuls) <= 2 + len(text) / 50, f"{path} is UTF-16: save it as UTF-8")
    itos = "".join(sorted(set(text)))
    data = encode(text, itos)
    n = int(0.9 * len(data))  # first 90% will be train, rest val
    require(len(data) - n > block_size, f"the text {path} is too short ({len(data)} characters): "
            f"windows of {block_size} need at least {10 * block_size + 1}")
    return data[:n], data[n:], itos


def get_batch(data, step, seed, batch_size, block_size):
    """Windows x at random places, by (seed, step) alone, and y, one character later: (B, T)."""
    starts = np.random.default_rng((seed, step)).integers(len(data) - block_size, size=batch_size)
    windows = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)]).long()  # (B, T+1)
    return windows[:, :-1], windows[:, 1:]

# Model: given the characters so far, how likely is each next one? Smallest part first. -------

def attention(q, k, v, mask, dropout=nn.Identity()):
    """softmax(q k^T / sqrt(d) + mask) v, for all heads ("Attention Is All You Need", 3.2.1).

    q (B, H, T, d), k and v (B, H, S, d) -> (B, H, T, d); mask (T, S) is 0, or -inf: do not look.
    """
    wei = (q * q.size(-1)**-0.5) @ k.transpose(-2, -1)  # (B, H, T, d), (B, H, d, S) -> (B, H, T, S)
    wei += mask  # the future gets the weight exp(-inf) = 0
    wei = F.softmax(wei, dim=-1)
    wei = dropout(wei)
    return wei @ v  # (B, H, T, S), (B, H, S, d) -> (B, H, T, d)


class MultiHeadAttention(nn.Module):
    """The communication between positions: n_head heads of causal self-attention in parallel."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        mask = torch.full((config.block_size, config.block_size), float("-inf")).triu(diagonal=1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        # A Head of the lecture has query(x), key(x) and value(x), each (B, T, d). Here one linear
        # layer computes those of all heads side by side, (B, T, H * d), with H * d = C. The view
        # cuts them apart, (B, T, H, d), and the transpose turns each head into a (T, d) matrix.
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, d)
                   for part in self.qkv(x).split(C, dim=-1))
        if cache is not None:  # (2, B, H, S, d): keys and values of the positions before `start`
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T]  # (B, H, S, d) each
        out = attention(q, k, v, self.mask[start:start + T, :start + T], self.dropout)
        out = out.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    """The computation in each position: a linear layer, a non-linearity, a linear layer."""

    def __init__(self, config):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.dropout),
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    """Transformer block: communication, then computation, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.sa = MultiHeadAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffwd = FeedForward(config)

    def forward(self, x, cache=None, start=0):
        x = x + self.sa(self.ln1(x), cache, start)
        x = x + self.ffwd(self.ln2(x))
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019, section 2.3): pre-norm blocks, learned positions, a tied head."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.depth = config.n_layer  # how many blocks are in use; the others rest (see grow)
        self.ln_f = nn.LayerNorm(config.n_embd)  # final layer norm
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding_table.weight  # tied: one table reads and writes

        # 2 n_layer projections add up in the residual stream, so each starts smaller (section 2.3).
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_stream = name.endswith(("proj.weight", "net.2.weight"))  # each part's last one
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer)**0.5 if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # Positions start as sines and cosines ("Attention Is All You Need", 3.5) and are then
        # learned: neighbours resemble each other from the first step on, and the model finds out
        # much sooner that the characters just before are the ones to look at.
        c = torch.arange(config.n_embd)  # c // 2 * 2 is 0, 0, 2, 2, ...: a sine and a cosine each
        angles = torch.arange(config.block_size)[:, None] * 10_000 ** -(c // 2 * 2 / config.n_embd)
        table = torch.where(c % 2 == 0, angles.sin(), angles.cos())  # (T, C)
        self.position_embedding_table.weight.data.copy_(0.02 * math.sqrt(2) * table)  # std 0.02

    def forward(self, idx, targets=None, cache=None, start=0):
        """idx, targets (B, T) integers -> logits (B, T, vocab_size), mean loss in nats (or None).

        With a cache, idx holds the characters from position `start` on, and the cache the keys and
        values of those before. Raises ValueError where the text would outgrow block_size.
        """
        B, T = idx.shape
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} characters, but block_size is {self.config.block_size}")
        tok_emb = self.token_embedding_table(idx)  # (B, T, C)
        pos_emb = self.position_embedding_table.weight[start:start + T]  # (T, C)
        x = self.dropout(tok_emb + pos_emb)  # (B, T, C)
        for i, block in enumerate(self.blocks[:self.depth]):
            x = block(x, None if cache is None else cache[i], start)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yields max_new_tokens times the next tokens (B, 1), sampled after idx (B, T).

        When the window of block_size positions is full, its later half moves to position 0 and is
        computed anew; all other tokens cost one position's work each. Call eval() first.
        """
        c = self.config
        cache = self.lm_head.weight.new_empty(  # the keys and values of positions before `start`
            c.n_layer, 2, len(idx), c.n_head, c.block_size, c.n_embd // c.n_head)
        window, start = idx[:, -c.block_size:], 0  # the window is what the model sees
        for _ in range(max_new_tokens):
            if window.size(1) > c.block_size:
                window, start = window[:, -max(1, c.block_size // 2):], 0
            logits, _ = self(window[:, start:], cache=cache, start=start)
            start = window.size(1)
            probs = next_token_probs(logits[:, -1], temperature, top_k, top_p)  # (B, vocab_size)
            idx_next = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
            window = torch.cat((window, idx_next), dim=1)
            yield idx_next

    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """Returns idx (B, T) with max_new_tokens sampled tokens appended; see stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **kwargs)], dim=1)


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to sample from, (B, vocab_size) like logits.

    Below 1 temperature makes the likely likelier; at 0 the likeliest alone is left. top_k keeps
    the k likeliest, top_p the fewest of the likeliest that together have that probability
    (nucleus sampling, Holtzman et al. 2020, section 3.1).
    """
    if temperature < 1e-6:  # greedy
        temperature, top_k = 1.0, 1
    likely, order = F.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    if top_k is not None:
        likely[:, top_k:] = 0
    if top_p is not None:
        likely = likely / likely.sum(dim=-1, keepdim=True)
        before = likely.cumsum(dim=-1) - likely  # the probability of all that are likelier
        likely = likely.where(before < top_p, 0)
    probs = torch.zeros_like(likely).scatter(-1, order, likely)  # in the old order again
    return probs / probs.sum(dim=-1, keepdim=True)


def sample(model, itos, prompt="", max_new_tokens=200, seed=1337, **how):
    """Yields the prompt and the characters that follow it, one by one; no prompt: a line begins."""
    model.eval()
    device = model.lm_head.weight.device
    ids = encode(prompt or ("\n" if "\n" in itos else itos[0]), itos)
    idx = torch.tensor(ids, dtype=torch.long, device=device)[None]  # (1, T)
    generator = torch.Generator(device).manual_seed(seed)
    yield prompt
    for idx_next in model.stream(idx, max_new_tokens, generator=generator, **how):
        yield decode(idx_next[0], itos)

# Training, part by part: how are the weights learned? ----------------------------------------

def get_lr(step, config):
    """The learning rate of a step: up in a straight line to learning_rate, then down to 0."""
    up = (step + 1) / (config.warmup_iters + 1)
    down = (config.max_iters - step) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * max(0, min(up, down))


def make_optimizer(model, config):
    """AdamW; weight decay pulls at the matrices alone, not at biases and layer norms."""
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=not params[0].is_mps)


def train_step(net, optimizer, x, y, lr, config):
    """Learns from a batch x, y (B, T). Returns the loss, in nats, and the gradient's length."""
    net.train()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits, loss = net(x, y)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip).item()
    require(math.isfinite(grad_norm), "the loss is not a finite number any more: "
            "start anew, with a lower --learning-rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.item(), grad_norm


@torch.no_grad()
def estimate_loss(model, data, max_tokens):
    """The mean loss in nats on about max_tokens of data: the same weights give the same figure."""
    model.eval()
    config, device = model.config, model.lm_head.weight.device
    # Windows that follow one another cover the data; if that is too much, take every n-th of them.
    T, n = config.block_size, math.ceil(len(data) / max_tokens)
    windows = np.lib.stride_tricks.sliding_window_view(data, T + 1)[::n * T].astype(np.int64)
    total = 0.0
    for xy in torch.from_numpy(windows).to(device).split(math.ceil(8192 / T)):  # (B, T+1)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            total += model(xy[:, :-1], xy[:, 1:])[1].item() * len(xy)
    return total / len(windows)


def evaluate(what, model, splits, max_tokens):
    """Shows the losses of the model on both splits, and returns them."""
    n = min(max_tokens, len(splits[1]))
    train_loss, val_loss = (estimate_loss(model, data, n) for data in splits)
    show(f"{what}: train loss {train_loss:.4f}, val loss {val_loss:.4f} "
         f"(on up to {n:,} characters)")
    return {"train_loss": train_loss, "val_loss": val_loss}


@torch.no_grad()
def grow(model, optimizer):
    """Puts all blocks to use, as copies: each block that was in use becomes several in a row."""
    # The first things learned need few blocks, and few blocks train faster (stacking: Gong et al.
    # 2019, "Efficient Training of BERT by Progressively Stacking"). The loss jumps, and is soon
    # lower than it was. The optimizer's memory of each weight is copied, too.
    n_layer = len(model.blocks)
    for i in reversed(range(n_layer)):  # the last one first, as the first ones are the sources
        source = model.blocks[i * model.depth // n_layer]  # 2 become 6: 0 0 0 1 1 1
        for p, q in zip(model.blocks[i].parameters(), source.parameters()):
            p.copy_(q)
            optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[q].items()}
    model.depth = n_layer

# Files: what is kept, and how? ---------------------------------------------------------------

def write_file(path, data):
    """Replaces the file `path` by these bytes: completely, or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only on its way there
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path, model, itos, **more):
    """Saves the model with all that is needed to use it: its settings and its vocabulary."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "depth": model.depth, "config": asdict(model.config),
                "itos": itos, **more}, file)
    write_file(Path(path), file.getbuffer())


def load_checkpoint(path):
    """Returns (model, checkpoint), on the CPU. Raises OSError, and UserError for a damaged file."""
    require(Path(path).exists(), f"there is no {path}: train a model, or say --out-dir where it is")
    data = Path(path).read_bytes()
    try:
        if zipfile.ZipFile(io.BytesIO(data)).testzip():  # torch.load would not notice a flipped bit
            raise ValueError("a part of it is not what was saved")
        checkpoint = torch.load(io.BytesIO(data), "cpu", weights_only=True)  # runs no code in it
        saved = checkpoint["config"]
        config = Config(**{f.name: saved[f.name] for f in fields(Config) if f.name in saved})
        model = GPT(config, len(checkpoint["itos"]))
        model.load_state_dict(checkpoint["model"])
        model.depth = checkpoint.get("depth", config.n_layer)
    except Exception as error:  # a file can be wrong in countless ways
        raise UserError(f"{path} is damaged, or no model of this script: {error!r:.100}") from error
    return model, checkpoint

# Training, all together ----------------------------------------------------------------------

# torchrun starts several processes and tells each its number; the first alone prints and saves.
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD_SIZE = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))
stopped = []  # the signals to stop that have come; train looks after each step


def highest(number, device):
    """The highest of all processes' numbers. All must call it, or the others wait for ever."""
    if WORLD_SIZE == 1:
        return number
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def pick_precision(device):
    """bf16 if this machine is clearly faster in it at products of matrices, else fp32: it tries."""
    def seconds(dtype):
        a = torch.ones(64 if device == "cpu" else 8192, 384, dtype=dtype, device=device)
        b = torch.ones(384, 1536, dtype=dtype, device=device)
        return min(timeit.repeat(lambda: (a @ b)[0, 0].item(), number=1, repeat=10))
    faster = device != "mps" and 1.3 * seconds(torch.bfloat16) < seconds(torch.float32)
    return "bf16" if highest(int(faster), device) else "fp32"


def steps_that_fit(config, model):
    """How many steps take config.minutes? Some are timed, with few blocks and with all of them."""
    began, few = time.perf_counter(), model.depth
    optimizer = make_optimizer(model, config)  # for these steps alone
    x = torch.zeros(config.batch_size // WORLD_SIZE, config.block_size).long().to(config.device)

    def seconds(depth):  # for a step, at a learning rate of 0, which changes no weight
        model.depth = depth
        return min(timeit.repeat(
            lambda: train_step(model, optimizer, x, x, 0.0, config), number=1, repeat=10))
    with_all, with_few = seconds(config.n_layer), seconds(few)  # now depth is what it was
    mean = config.grow_at * with_few + (1 - config.grow_at) * with_all
    left = 60 * config.minutes - (time.perf_counter() - began)
    steps = max(1, int(left / (1.16 * mean)))  # 16 % extra for slower steps, evaluations, samples
    return -highest(-steps, config.device)  # the lowest, if there are several processes


def show(text):
    """Prints a line. If its reader has closed the pipe, that counts as SIGTERM: save and stop."""
    try:
        if RANK == 0:
            print(text, flush=True)
    except BrokenPipeError:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is still to be said goes there
        stopped.append(signal.SIGTERM)


def set_up(config, given):
    """Returns model, optimizer, [train_data, val_data], itos, run: new, or as latest.pt has them.

    run is a dictionary: the step, the seconds of training until then, the log's rows, the text.
    """
    out_dir = Path(config.out_dir)
    if config.resume:
        model, saved = load_checkpoint(out_dir / "latest.pt")
        require("run" in saved, f"{out_dir / 'latest.pt'} is no run to go on with")
        may_differ = {"data", "out_dir", "device", "max_iters", "resume", "overwrite"}
        for name in sorted(given.keys() - may_differ):
            was = getattr(model.config, name)
            require(given[name] == was, f"--{name.replace('_', '-')}: the saved run has {was}")
        # The saved settings, but for what is given now; folder and device are today's.
        today = {"out_dir": config.out_dir, "device": config.device, **given}
        config = replace(model.config, **today)
    elif RANK == 0 and not config.overwrite:
        require(not any(out_dir.glob("*")), f"{out_dir} is taken: let its model write (--prompt "
                "\"ROMEO:\"), train it on (--resume), take another --out-dir, or --overwrite it")
    require(config.n_embd % config.n_head == 0, "--n-embd must be a multiple of --n-head")
    require(config.n_layer * config.n_embd**2 < 1e8, "more than 1.2 billion parameters: too large")
    require(config.batch_size % WORLD_SIZE == 0, f"--batch-size must be a multiple of {WORLD_SIZE}")
    *splits, itos = load_data(config.data, config.block_size)
    text_hash = hashlib.sha256(b"".join([itos.encode(), *splits])).hexdigest()
    if RANK == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "log.csv").touch()  # from now on the folder is taken

    if not config.resume:
        run = {"step": 0, "seconds": 0.0, "log": [], "text_hash": text_hash}
        config.precision = config.precision or pick_precision(config.device)
        torch.manual_seed(config.seed)
        model = GPT(config, len(itos))
        model.depth = max(1, config.n_layer // 3) if config.grow_at else config.n_layer
    optimizer = make_optimizer(model.to(config.device), config)
    if config.resume:
        run = saved["run"]
        require(run["text_hash"] == text_hash, f"{config.data} is not the text of the saved run")
        optimizer.load_state_dict(saved["optimizer"])
    show(f"text {config.data}: {sum(map(len, splits)):,} characters, {len(itos)} distinct\n"
         f"{config.n_layer} layers, {sum(p.numel() for p in model.parameters()):,} parameters, "
         f"{config.precision} on {config.device}")
    if config.max_iters is None:
        config.max_iters = steps_that_fit(config, model)
        show(f"{config.max_iters} steps fit into {config.minutes:g} min "
             f"(--max-iters {config.max_iters} --precision {config.precision} repeats this run)")
    if model.depth < config.n_layer:
        show(f"{model.depth} of {config.n_layer} blocks train for the first {config.grow_at:.0%} "
             "of the steps")
    tokens = config.max_iters * config.batch_size * config.block_size
    config.eval_interval = config.eval_interval or math.ceil(config.max_iters / 10)
    config.eval_tokens = config.eval_tokens or max(1000, tokens // 400)
    config.data = str(Path(config.data).resolve())
    model.config = config
    return model, optimizer, splits, itos, run


def train(model, optimizer, splits, itos, run):
    """Trains a model, new or saved, until it is finished or a signal is in `stopped`."""
    config, device, out_dir = model.config, model.config.device, Path(model.config.out_dir)
    step, seconds, log = run["step"], run["seconds"], run["log"]
    grow_step = int(config.grow_at * config.max_iters)
    step_tokens = config.batch_size * config.block_size
    grad_norm = block_seconds = sample_at = status_at = 0.0  # not known yet; due at once
    net = torch.compile(model) if device == "cuda" and find_spec("triton") else model
    if WORLD_SIZE > 1:  # averages the gradients of all processes; some blocks may have none
        net = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)

    while True:
        # Between two steps a run can be saved and stopped. If one process is to stop, all do.
        done = step >= config.max_iters
        over = done or highest(len(stopped), device) > 0
        # Now and then: how good is the model, on text it learns from and on text it never saw?
        due = done or step % config.eval_interval == 0
        if RANK == 0 and due and (not log or log[-1]["step"] < step):
            row = dict(step=step, tokens=step * step_tokens, seconds=seconds,
                       **evaluate(f"step {step}", model, splits, config.eval_tokens),
                       learning_rate=get_lr(step, config), grad_norm=grad_norm)
            log.append({name: round(value, 9) for name, value in row.items()})
            if log[-1]["val_loss"] == min(old["val_loss"] for old in log):
                save_checkpoint(out_dir / "model.pt", model, itos)
        if RANK == 0 and (due or over):
            run.update(step=step, seconds=seconds)  # its log has grown already
            save_checkpoint(out_dir / "latest.pt", model, itos, run=run,
                            optimizer=optimizer.state_dict())
            table = [log[0].keys(), *(old.values() for old in log)]
            lines = [",".join(map(str, line)) + "\n" for line in table]
            write_file(out_dir / "log.csv", "".join(lines).encode())
        if RANK == 0 and (done or time.perf_counter() > sample_at):
            text = "".join(sample(model, itos, seed=config.seed))
            show(f"what it writes after {step} steps:\n{text}\n")
            write_file(out_dir / "sample.txt", text.encode())
            sample_at = time.perf_counter() + (45 if step else 8)  # seconds
        if over:
            return
        if model.depth < config.n_layer and step >= grow_step:
            grow(model, optimizer)
            show(f"step {step}: the model grows to {config.n_layer} blocks")

        # One step. Seeded like this, its batch and its dropout depend on (seed, step) alone.
        began = time.perf_counter()
        torch.manual_seed(config.seed + step * WORLD_SIZE + RANK)
        x, y = get_batch(splits[0], step, config.seed, config.batch_size, config.block_size)
        x, y = x[RANK::WORLD_SIZE].to(device), y[RANK::WORLD_SIZE].to(device)
        loss, grad_norm = train_step(net, optimizer, x, y, get_lr(step, config), config)
        step, took = step + 1, time.perf_counter() - began
        seconds += took

        # How long will it take? As long as a block took of late (a running mean in which each step
        # counts 5 %, and the first one all), times the blocks still to come.
        block_seconds += (took / model.depth - block_seconds) * (0.05 if block_seconds else 1)
        if time.perf_counter() > status_at:
            with_few, left = max(0, grow_step - step), config.max_iters - step  # steps
            blocks = model.depth * with_few + config.n_layer * (left - with_few)
            show(f"step {step} of {config.max_iters} | loss {loss:.4f} | {step_tokens / took:,.0f} "
                 f"tokens/s | {block_seconds * blocks / 60:.1f} min left")
            status_at = time.perf_counter() + 10


def finish(model, splits, run):
    """Draws the losses, if matplotlib is there, and says how good the model is and how to go on."""
    config, out_dir, log = model.config, Path(model.config.out_dir), run["log"]
    if find_spec("matplotlib"):
        from matplotlib.figure import Figure
        ax = Figure().subplots()
        for name in "train_loss", "val_loss":
            ax.plot([row["tokens"] for row in log], [row[name] for row in log], ".-", label=name)
        ax.set_xlabel("characters trained on")
        ax.legend(loc="upper right")
        ax.figure.savefig(out_dir / "loss.png", dpi=150)
    step = run["step"]
    if step < config.max_iters:
        show(f"stopped after step {step} of {config.max_iters}, and saved: --resume goes on")
        return
    best = load_checkpoint(out_dir / "model.pt")[0].to(config.device)
    evaluate("the best model", best, splits, max(1000, log[-1]["tokens"] // 20))
    show(f"finished after step {step} (to train on: --resume --max-iters MORE); let it write:\n"
         f"    python transformer.py --out-dir {shlex.quote(config.out_dir)} --prompt ''")

# The command line: what did the user ask for, and does it make sense? ------------------------

def check(given, writing):
    """Raises UserError for the first flag that makes no sense; given has their values by name."""
    for f in fields(Config):
        option, value = "--" + f.name.replace("_", "-"), given.get(f.name)
        low, high = f.metadata.get("limits", (-math.inf, math.inf))
        require(value != "" or f.name == "prompt", f"{option} is empty")
        require(type(value) not in (int, float) or low <= value <= high,
                f"{option} must be {'at least' if low == 0 else 'above'} 0, at most {high:g}")
        require(value is None or f.name in BOTH or (f.name in WRITING) == writing,
                f"{option} is for {'training' if writing else 'writing: add --prompt TEXT'}")
    for pair in ("minutes", "max_iters"), ("prompt", "prompt_file"):
        require(not set(pair) <= given.keys(), "give one of {} and {}, not both".format(*pair))


def let_it_write(config):
    """Prints texts that begin with the prompt, as they come, from the best model in out_dir."""
    torch.set_num_threads(1)  # as fast as two, and not slowed down by what else the machine does
    model, saved = load_checkpoint(Path(config.out_dir) / "model.pt")
    model.to(config.device)
    prompt = config.prompt
    if config.prompt_file:
        prompt = Path(config.prompt_file).read_text(encoding="utf-8-sig")
    prompt = prompt.replace("\r\n", "\n").replace("\r", "\n")  # as in the text it learned from
    for i in range(config.num_samples):
        if i > 0:
            print()
        for piece in sample(model, saved["itos"], prompt, config.max_new_tokens, config.seed + i,
                            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p):
            print(piece, end="", flush=True)
        print(flush=True)


def launch(config, given):
    """Trains, under torchrun as one of several processes; returns the exit status."""
    def stop(number, frame):
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once
    stopped.clear()
    if threading.current_thread() is threading.main_thread():  # others may not catch signals
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model, optimizer, splits, itos, run = set_up(config, given)
    train(model, optimizer, splits, itos, run)
    if RANK == 0:
        finish(model, splits, run)
    if WORLD_SIZE > 1:
        dist.barrier()  # a process that leaves while others are at work may abort
        dist.destroy_process_group()
    return 128 + stopped[0] if stopped else 0


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="transformer.py", description=__doc__, epilog=f"defaults on a GPU: {CUDA_DEFAULTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage=argparse.SUPPRESS)  # so that an error is one line
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help = f.metadata.get("help", "") + (f" (default: {f.default})" if f.default else "")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=help.replace("%", "%%"), **f.metadata.get("more", {}))
    if hasattr(sys.stdout, "reconfigure"):  # UTF-8 in files and pipes; ? for what a terminal lacks
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    given = vars(parser.parse_args(argv))
    writing = "prompt" in given or "prompt_file" in given
    cuda = given.get("device", DEVICES[0]) == "cuda"
    config = Config(**{**(CUDA_DEFAULTS if cuda else {}), **given})
    if "minutes" in given:
        config.max_iters = None  # the minutes decide, not CUDA_DEFAULTS
    try:
        check(given, writing)
        return let_it_write(config) if writing else launch(config, given)
    except BrokenPipeError:  # whoever reads the text has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        parser.error(str(error))
    except UnicodeDecodeError as error:
        parser.error(f"{config.prompt_file or given.get('data', 'the text')} is not UTF-8 text: "
                     f"see byte {error.start}; save it as UTF-8, or unpack it")
    except OSError as error:
        parser.error(f"{error.filename or 'cannot save'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if "MemoryError" not in repr(error) and "allocate" not in repr(error):
            raise
        parser.error("out of memory: try a smaller --batch-size or model")


if __name__ == "__main__":
    sys.exit(main())
