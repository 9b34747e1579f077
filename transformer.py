"""
A GPT-2, small enough to train on a laptop: characters in, characters out, everything on one page.

It follows Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out", in the same
order and with the same names, and goes past it: the trained model is kept, a stopped run goes on
where it was, and a new character costs one character's work instead of the whole context's.

    python transformer.py                      # train for 20 minutes; two CPU cores are enough
    python transformer.py --prompt "ROMEO:"    # let the trained model write
    python transformer.py --resume             # go on after an interruption
"""
import argparse
import hashlib
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------
# Hyperparameters: what can be chosen? Every field is a flag (--n-layer 4), its comment the help.

@dataclass
class Config:
    data: str = ""  # UTF-8 text; default data/tinyshakespeare/input.txt if fetched, else input.txt
    out_dir: str = "out/transformer"  # folder for the model, log.csv and sample.txt
    device: str = ""  # cuda, cpu or mps; default cuda where there is one, else cpu
    precision: str = ""  # fp32 or bf16 (mixed); default the one that this machine multiplies faster
    seed: int = 1337  # the same seed on the same machine gives the same run
    # the model
    n_layer: int = 6  # blocks, one after the other
    n_head: int = 6  # attention heads in a block; must divide n_embd
    n_embd: int = 384  # channels: the length of the vector that stands for a character
    block_size: int = 256  # context: how many characters the model sees at once
    dropout: float = 0.0  # share of activations zeroed in training; more when the text is seen often
    # the training
    batch_size: int = 4  # windows of block_size characters in a step (over all processes together)
    max_iters: int = 0  # training steps; 0, when not given: as many as fit into the minutes
    minutes: float = 20.0  # how long the run takes, evaluations included, if max_iters is not given
    grow_at: float = 0.85  # share of the steps in which a third of the blocks trains, before they grow to all; 0: none
    eval_interval: int = 1000  # steps between two evaluations, each of which saves the run
    eval_tokens: int = 200_000  # evaluate on at most so many characters of each split
    learning_rate: float = 1e-3  # the highest, reached after the warm-up; falls to 0 at max_iters
    warmup_iters: int = 100  # steps in which the learning rate rises
    weight_decay: float = 0.1  # pull of the weight matrices towards zero (AdamW)
    noise: float = 0.0  # share of characters misread in training: like dropout, against learning by heart
    rename: float = 0.1  # share of names that training replaces by made-up ones, so that it learns to spell new ones
    beta2: float = 0.99  # memory of AdamW for squared gradients; higher is longer
    grad_clip: float = 1.0  # longest gradient allowed; a longer one is scaled down to it

# On a GPU steps are cheap, the text is seen many times, and dropout keeps it from being learnt by heart.
CUDA_DEFAULTS = dict(batch_size=64, max_iters=2500, eval_interval=250, dropout=0.2, rename=0.0, grow_at=0.0)

UNLIMITED = 10**9  # max_iters while it is not known yet how many steps fit into the minutes


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
# Model: given the characters so far, how likely is each next one? Smallest part first.

def dropout(x, p):
    """Zeroes each number with probability p and divides the rest by 1 - p (Srivastava et al. 2014).

    On a CPU F.dropout spends most of its time drawing 64 random bits for each. Here each has 16.
    """
    if p == 0 or not x.is_cpu:
        return F.dropout(x, p)
    bits = torch.randint(-2**63, 2**63 - 1, (x.numel() // 4 + 1,)).view(torch.int16)[:x.numel()].view(x.shape)
    return x * ((bits >= round(2**16 * p) - 2**15).to(x.dtype) / (1 - p))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p if self.training else 0.0)


def attention(q, k, v, mask, dropout_p=0.0, fused=False):
    """softmax(q k^T / sqrt(d) + mask) v, for every head at once ("Attention Is All You Need", 3.2.1).

    q is (B, H, T, d), k and v are (B, H, S, d), the result is (B, H, T, d). mask (T, S) holds 0
    where a position may look and -inf where not. With fused=True PyTorch's kernel computes the
    same in one go, for T = S and the causal mask: faster on a GPU, slower on a CPU.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    wei = (q * q.size(-1)**-0.5) @ k.transpose(-2, -1)  # (B, H, T, d) @ (B, H, d, S) -> (B, H, T, S)
    wei += mask  # the future gets the weight exp(-inf) = 0
    wei = F.softmax(wei, dim=-1)
    wei = dropout(wei, dropout_p)
    return wei @ v  # (B, H, T, S) @ (B, H, S, d) -> (B, H, T, d)


class MultiHeadAttention(nn.Module):
    """The communication between positions: n_head heads of causal self-attention in parallel."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)
        mask = torch.full((config.block_size, config.block_size), float("-inf")).triu(diagonal=1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        if cache is not None:  # keys and values of the positions before `start` are there already
            cache[:, :, :, start:start + T] = qkv[1:]
            k, v = cache[:, :, :, :start + T]
        mask = self.mask[start:start + T, :start + T]
        dropout_p = self.dropout.p if self.training else 0.0
        out = attention(q, k, v, mask, dropout_p, fused=x.is_cuda and cache is None)
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
            Dropout(config.dropout),
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    """Transformer block: communication followed by computation, each added to the residual stream."""

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
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)  # final layer norm
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding_table.weight  # tied: one table reads and writes

        for name, p in self.named_parameters():
            if p.dim() == 2:
                # the 2 n_layer projections add up in the residual stream: each starts smaller (section 2.3)
                into_stream = name.endswith(("proj.weight", "net.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # Positions start as sines and cosines of slowly to quickly changing angles ("Attention Is All
        # You Need", 3.5) and are then learned: neighbours resemble each other from the first step on,
        # and the model finds out much sooner that the characters just before are the ones to look at.
        positions = torch.arange(config.block_size)[:, None]  # (T, 1)
        angles = positions * 10_000 ** -(torch.arange(config.n_embd) // 2 * 2 / config.n_embd)  # (T, C)
        table = torch.where(torch.arange(config.n_embd) % 2 == 0, angles.sin(), angles.cos())
        with torch.no_grad():
            self.position_embedding_table.weight.copy_(0.02 * math.sqrt(2) * table)

    def forward(self, idx, targets=None, cache=None, start=0):
        """idx and targets are (B, T) integers; returns logits (B, T, vocab_size) and the mean loss in nats.

        Without targets the loss is None. With a cache (see new_cache) idx holds the characters from
        position `start` on, and the cache what was computed for those before.
        Raises ValueError where the text would reach beyond block_size.
        """
        B, T = idx.shape
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} characters, but block_size is {self.config.block_size}")
        tok_emb = self.token_embedding_table(idx)  # (B, T, C)
        pos_emb = self.position_embedding_table.weight[start:start + T]  # (T, C)
        x = self.dropout(tok_emb + pos_emb)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_cache(self, batch_size):
        """Room for the keys and values of block_size positions: (n_layer, 2, B, H, block_size, d)."""
        c, weight = self.config, self.lm_head.weight
        return weight.new_zeros(c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)

    def spelled_out(self, cache):
        """forward for a single character of a single text, in its elementary operations: returns a function.

        next_logits(token, position) gives the logits (vocab_size,) that forward would with this cache, in
        half the time: for so little arithmetic calling modules takes as long, and PyTorch leaves the
        product of a matrix and a vector to one core. Whoever changes Block has to change this too.
        """
        C, n_head = self.config.n_embd, self.config.n_head
        n = math.gcd(torch.get_num_threads(), C)  # so many cores share each product

        def parts(layer):  # weight and bias, a matrix with its rows shared out: (n, rows, in)
            weight = layer.weight
            return weight.view(n, -1, weight.size(1)) if weight.dim() == 2 else weight, layer.bias

        def linear(x, weight, bias):  # (n, rows, in) @ (n, in, 1) -> (n, rows, 1) -> (out,)
            return torch.bmm(weight, x.expand(n, 1, -1).transpose(1, 2)).view(-1).add_(bias)

        layers = [(kv, *map(parts, (b.ln1, b.sa.qkv, b.sa.proj, b.ln2, b.ffwd.net[0], b.ffwd.net[2])))
                  for b, kv in zip(self.blocks, cache)]

        def next_logits(token, position):
            x = self.token_embedding_table.weight[token] + self.position_embedding_table.weight[position]  # (C,)
            for kv, ln1, qkv, proj, ln2, up, down in layers:
                qkv = linear(F.layer_norm(x, (C,), *ln1), *qkv).view(3, 1, n_head, 1, -1)
                kv[:, :, :, position:position + 1] = qkv[1:]
                k, v = kv[:, :, :, :position + 1].unbind()
                x = x + linear(F.scaled_dot_product_attention(qkv[0], k, v).view(-1), *proj)
                h = linear(F.layer_norm(x, (C,), *ln2), *up)
                x = x + linear(F.gelu(h, approximate="tanh"), *down)
            return self.lm_head(self.ln_f(x))

        return next_logits

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
               kv_cache=True):
        """Yields max_new_tokens times the next tokens (B, 1), sampled after idx (B, T); call eval() first.

        Positions end at block_size. When the window is full, its later half is kept, moves to
        position 0 and is computed anew; every other token costs one position's work. So memory
        and the cost per token stay bounded, however long the text. kv_cache=False computes the
        whole window for each token, and gives the same.
        """
        window = idx[:, -self.config.block_size:]  # the characters that the model sees
        cache, start = self.new_cache(len(idx)), 0  # the cache holds what comes before `start`
        next_logits = self.spelled_out(cache)
        for _ in range(max_new_tokens):
            if window.size(1) > self.config.block_size:
                window, start = window[:, -max(1, self.config.block_size // 2):], 0
            if not kv_cache:
                logits, _ = self(window)
            elif window.numel() == start + 1:  # one text, and one character of it is not in the cache yet
                logits = next_logits(window[0, start], start)[None, None]
            else:
                logits, _ = self(window[:, start:], cache=cache, start=start)
            start = window.size(1)
            probs = next_token_probs(logits[:, -1], temperature, top_k, top_p)  # (B, vocab_size)
            idx_next = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
            window = torch.cat((window, idx_next), dim=1)
            yield idx_next

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **how):
        """Returns idx (B, T) with max_new_tokens sampled tokens appended; see stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **how)], dim=1)


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to sample from, (B, vocab_size) like logits.

    temperature divides the logits: below 1 the likely gets likelier, 0 is the likeliest alone.
    top_k keeps the k likeliest. top_p keeps the fewest of the likeliest that together reach the
    probability top_p (nucleus sampling, Holtzman et al. 2020, section 3.1).
    """
    if temperature < 1e-6:  # greedy
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = (logits.float() - logits.max(dim=-1, keepdim=True).values) / temperature
    if top_k is not None:
        top = logits.topk(min(top_k, logits.size(-1)), dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, top.indices, top.values)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None:
        likely, order = probs.sort(dim=-1, descending=True)
        before = likely.cumsum(dim=-1) - likely  # the probability of all that are likelier
        probs = torch.zeros_like(probs).scatter(-1, order, likely.where(before < top_p, 0))
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs

# ---------------------------------------------------------------------------------------------
# Training: how do the weights get there, and how does one see it?

def pick_device(name):
    """`name`, or the best device there is. Raises UserError for one that this machine lacks."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name and not there.get(name):
        raise UserError(f"--device {name}: not on this machine, which has "
                        + ", ".join(device for device in there if there[device]))
    return name or ("cuda" if there["cuda"] else "cpu")


def wait_for(device):
    """A GPU works behind the program's back: before the clock is read, let it finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def pick_precision(device):
    """bf16 where this machine multiplies matrices faster in it, else fp32: tried, as no list stays true."""
    if device == "mps":
        return "fp32"

    def seconds(dtype):
        a = torch.ones(4096 if device == "cuda" else 64, 384, dtype=dtype, device=device)
        b = torch.ones(384, 1536, dtype=dtype, device=device)
        times = []
        for _ in range(10):
            wait_for(device)
            start = time.perf_counter()
            a @ b
            wait_for(device)
            times.append(time.perf_counter() - start)
        return min(times)

    return "bf16" if 1.3 * seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"


def autocast(device, precision):
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def misread(x, p):
    """Replaces each integer of x, with probability p, by another of x: what was learned by heart then seldom fits.

    See Xie et al. 2017, "Data Noising as Smoothing in Neural Network Language Models".
    """
    if p == 0:
        return x
    others = x.flatten()[torch.randperm(x.numel(), device=x.device)].view_as(x)
    return torch.where(torch.rand(x.shape, device=x.device) < p, others, x)


def find_names(text):
    """Words of three letters or more that the text never writes small, by length: {8: ["coriolan", ...], ...}.

    They are in small letters here. Most are names; some only ever begin a line.
    """
    words, names = set(re.findall(r"\w{3,}", text)), {}
    for name in sorted({word.lower() for word in words} - words):
        names.setdefault(len(name), []).append(name)
    return names


def rename(windows, p, names, itos, rng):
    """Gives each name in a window, with probability p, another: the beginning of one and the end of another.

    windows is (B, T+1), and so is the result. A name keeps its length, and is the same throughout a window.
    The names of a text are soon known by heart, and of no use in another text: there it helps to spell.
    """
    def new_name(match):
        word = match[0].lower()
        if word not in made:
            same_length = names.get(len(word), [])
            known = word in same_length and rng.random() < p
            first, second = rng.choice(same_length, 2) if known else (word, word)
            made[word] = first[:len(word) // 2] + second[len(word) // 2:]
        name = made[word].upper() if match[0].isupper() else made[word].capitalize()
        fits = len(name) == len(match[0]) and set(name) <= set(itos)  # a large ß is SS
        return name if made[word] != word and fits else match[0]

    texts = []
    for window in windows:
        made = {}
        texts.append(re.sub(r"\w{3,}", new_name, decode(window, itos)))
    return torch.from_numpy(encode("".join(texts), itos).reshape(windows.shape)).long()


def get_lr(step, config):
    """The learning rate of a step: up in a straight line to learning_rate, then down to 0 at max_iters."""
    up = (step + 1) / (config.warmup_iters + 1)
    down = (config.max_iters - step) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * min(up, down)


def make_optimizer(model, config, device):
    """AdamW; weight decay pulls at the matrices alone, not at biases and layer norms."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    fused = device == "cuda" or device == "cpu" and torch.__version__ >= "2.4"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=fused)


def n_blocks(step, config):
    """How many blocks the model has in a step: a third at first, from the step grow_at * max_iters on all of them."""
    return max(1, config.n_layer // 3) if step < int(config.grow_at * config.max_iters) else config.n_layer


def grow(model, optimizer, config, device):
    """Makes a model of config.n_layer blocks from one with fewer, each of which becomes several in a row.

    The loss jumps, and is soon lower than it was: the first things to learn need few blocks, which learn them
    in a fraction of the time (stacking: Gong et al. 2019, "Efficient Training of BERT by Progressively
    Stacking"). Returns the model and its optimizer, which remembers of each weight what that of its source did.
    """
    old, fewer = dict(model.named_parameters()), len(model.blocks)
    model = GPT(config, model.lm_head.out_features).to(device)
    memory, optimizer = optimizer.state, make_optimizer(model, config, device)
    for name, p in model.named_parameters():
        source = old[re.sub(r"\d+", lambda i: str(int(i[0]) * fewer // config.n_layer), name, count=1)]
        p.data.copy_(source)
        optimizer.state[p] = {key: value.clone() for key, value in memory[source].items()}
    return model, optimizer


def full_steps(step, config):
    """The work that is left at a step, in steps of the model with all its blocks."""
    small = max(0, int(config.grow_at * config.max_iters) - step)
    return config.max_iters - step - small * (1 - n_blocks(0, config) / config.n_layer)


@torch.no_grad()
def estimate_loss(model, data, max_tokens, device, precision="fp32", stopped=()):
    """The mean loss in nats over fixed windows of data: the same weights always give the same figure.

    The windows follow one another and cover all of data, the last one being shorter; of data longer
    than max_tokens they are every n-th. Returns None if a signal arrives meanwhile (see train).
    """
    T = model.config.block_size
    windows = [data[i:i + T + 1] for i in range(0, len(data) - 1, T * math.ceil(len(data) / max_tokens))]
    last = windows.pop() if len(windows[-1]) <= T else None
    batches = [np.stack(windows[i:i + 32]) for i in range(0, len(windows), 32)]
    batches += [last[None]] if last is not None else []
    model.eval()
    total = count = 0
    for batch in batches:
        if stopped:
            break
        xy = torch.from_numpy(batch.astype(np.int64)).to(device)  # (B, T+1)
        with autocast(device, precision):
            _, loss = model(xy[:, :-1], xy[:, 1:])
        total += loss.item() * xy[:, 1:].numel()
        count += xy[:, 1:].numel()
    model.train()
    return None if stopped else total / count


def replace_file(path, write):
    """Has write(file) fill a new file, which then takes the place of `path`: whole, or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only on its way there
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch.save makes of a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; what was saved before is intact") from None


def save_checkpoint(path, model, itos, **more):
    """Saves the model with all that is needed to use it: its settings and its vocabulary."""
    checkpoint = {"model": model.state_dict(), "config": asdict(model.config), "itos": itos, **more}
    replace_file(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path):
    """Reads what save_checkpoint wrote: returns (model, checkpoint), on the CPU.

    Raises UserError if there is no such file, or anything in it is not as it was written.
    """
    if not path.exists():
        raise UserError(f"there is no {path}: train a model first, or say with --out-dir where it is")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load alone would not notice a flipped bit
            if file.testzip() is not None:
                raise ValueError("wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
        model = GPT(Config(**checkpoint["config"]), len(checkpoint["itos"]))
        model.load_state_dict(checkpoint["model"])
    except Exception:  # there is no end to the ways in which a file can be wrong
        raise UserError(f"{path} is damaged, or is not a model that transformer.py saved") from None
    return model, checkpoint


def catch_signals():
    """From now on Ctrl-C and SIGTERM only add to the list returned; a second one ends the program at once."""
    caught = []
    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


# torchrun starts several processes and tells each its number; the first alone prints and saves
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def highest(number, device):
    """The highest of the numbers that the processes bring here; all of them must come."""
    if WORLD_SIZE == 1:
        return number
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def show(text, passing=False):
    """Prints a line; on a terminal, the next one takes the place of a passing one."""
    terminal = sys.stdout.isatty()
    if RANK == 0:
        print(f"\r{text:<79}" if terminal else text, end="" if terminal and passing else "\n", flush=True)


def size(model):
    return f"n_layer {len(model.blocks)}, {sum(p.numel() for p in model.parameters()):,} parameters"


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def draw_log(path, log):
    """Makes of the lines of log.csv a picture, if there is matplotlib to draw it."""
    if len(log) == 1:
        return  # no evaluation yet
    try:
        from matplotlib.figure import Figure
    except ImportError:
        show(f"for a picture of the losses, {path}: pip install matplotlib, then the same command with --resume")
        return
    columns = dict(zip(log[0].split(","), np.array([line.split(",") for line in log[1:]], dtype=float).T))
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    for name, ax in zip(("train_loss", "val_loss", "learning_rate", "grad_norm"), axes[[0, 0, 1, 2]]):
        ax.plot(columns["tokens"], columns[name], ".-", label=name)
    for label, ax in zip(("loss (nats per character)", "learning rate", "gradient norm"), axes):
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].legend()
    axes[2].set_xlabel("characters trained on")
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))


def train(config, checkpoint=None, stopped=()):
    """Trains a model, keeps it in config.out_dir, and returns the exit status.

    A signal in `stopped` (see catch_signals) ends the run after the step at hand and saves it; with
    the checkpoint that latest.pt then holds it goes on. The batch and the dropout of a step depend
    on (seed, step) alone, so it ends exactly where it would have ended without the interruption.
    """
    device, path, out_dir = pick_device(config.device), find_data(config.data), Path(config.out_dir)
    train_data, val_data, itos = load_data(path, config.block_size)
    text_hash = hashlib.sha256(itos.encode())
    for part in (train_data, val_data):
        text_hash.update(part)
    text_hash = text_hash.hexdigest()
    if checkpoint and checkpoint["text_hash"] != text_hash:
        raise UserError(f"{path} is not the text that the run in {out_dir} was trained on")
    if config.batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size {config.batch_size} cannot be split evenly over {WORLD_SIZE} processes")
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "latest.pt.part").touch()  # where nothing can be written, say so now, not at the first save
    (out_dir / "latest.pt.part").unlink(missing_ok=True)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    config = replace(config, precision=config.precision or pick_precision(device),
                     max_iters=config.max_iters or UNLIMITED)
    torch.manual_seed(config.seed)
    blocks = checkpoint["config"]["n_layer"] if checkpoint else n_blocks(0, config)
    model = GPT(replace(config, n_layer=blocks), len(itos)).to(device)
    optimizer = make_optimizer(model, config, device)
    step, seconds, grad_norm, best_val_loss = 0, 0.0, 0.0, math.inf
    log = ["step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm"]
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, seconds, grad_norm, best_val_loss, log = checkpoint["progress"]

    def parallel(model):
        net = torch.compile(model) if device == "cuda" and find_spec("triton") else model
        return nn.parallel.DistributedDataParallel(net) if WORLD_SIZE > 1 else net

    net = parallel(model)
    names = find_names(decode(train_data[:10**7], itos)) if config.rename else {}  # of a large text its beginning

    def save_latest():
        progress = [step, seconds, float(grad_norm), best_val_loss, log]
        replace_file(out_dir / "log.csv", lambda file: file.write("\n".join(log + [""]).encode()))
        save_checkpoint(out_dir / "latest.pt", model, itos, progress=progress, text_hash=text_hash,
                        optimizer=optimizer.state_dict(), run=asdict(config))

    def check(number):
        if not math.isfinite(number):
            raise UserError(f"the loss is not a finite number any more at step {step}: try a lower "
                            f"--learning-rate (what was saved before in {out_dir} is intact)")

    show(f"device {device}, precision {config.precision}, {size(model)}")
    show(f"text {path}: {len(train_data) + len(val_data):,} characters, {len(itos)} distinct")
    tokens_per_step = config.batch_size * config.block_size
    eval_tokens = min(len(val_data), config.eval_tokens)
    eval_steps = eval_tokens / tokens_per_step  # an evaluation takes as long as this: two splits, no backward
    shown, first_step = 0.0, step
    measured = step + 12  # after this step it is known how fast it goes
    if config.max_iters == UNLIMITED:
        measured = step + max(12, config.warmup_iters // 2)
        show(f"{measured - step} steps will show how many fit into {config.minutes:g} min")
    clock, clock_step = time.perf_counter(), step  # since when, and from which step on, training runs
    while True:
        # Now and then: how good is the model, on text it learns from and on text it never saw?
        due = step > 0 and (step % config.eval_interval == 0 or step == config.max_iters)
        if RANK == 0 and due and not log[-1].startswith(f"{step},"):
            wait_for(device)
            seconds += time.perf_counter() - clock
            losses = [estimate_loss(model, data, eval_tokens, device, config.precision, stopped)
                      for data in (train_data, val_data)]
            if not stopped:
                check(sum(losses))
                show(f"step {step}: train loss {losses[0]:.4f}, val loss {losses[1]:.4f}")
                log.append(f"{step},{step * tokens_per_step},{seconds:.2f},{losses[0]:.6f},{losses[1]:.6f},"
                           f"{get_lr(step - 1, config):.6g},{grad_norm:.6g}")
                if losses[1] < best_val_loss:
                    best_val_loss = losses[1]
                    save_checkpoint(out_dir / "model.pt", model, itos)
                sample = write_sample(model, itos, config.seed)
                show(sample + "\n")
                replace_file(out_dir / "sample.txt", lambda file: file.write(sample.encode()))
                save_latest()
            clock, clock_step = time.perf_counter(), step

        if highest(len(stopped), device):
            seconds += time.perf_counter() - clock
            check(grad_norm)
            if RANK == 0:
                save_latest()
                if best_val_loss == math.inf:  # no evaluation yet: have a model to sample from, all the same
                    save_checkpoint(out_dir / "model.pt", model, itos)
                draw_log(out_dir / "loss.png", log)
            show(f"stopped after step {step} of {config.max_iters}, and saved: the same command with --resume goes on")
            return 128 + (stopped or [signal.SIGTERM])[0]
        if step >= config.max_iters:
            if RANK == 0:
                draw_log(out_dir / "loss.png", log)
            show(f"finished after step {step} (to train for longer: --resume with a larger --max-iters)\n"
                 f"{out_dir / 'model.pt'} holds the best model, val loss {best_val_loss:.4f}; to let it write:\n"
                 f"    python transformer.py --out-dir {out_dir} --prompt \"\"")
            return 0

        if len(model.blocks) < n_blocks(step, config):
            model, optimizer = grow(model, optimizer, config, device)
            net = parallel(model)
            show(f"step {step}: the model grows to {size(model)}")

        # One step: a batch, the gradient of its loss, a small move of all weights against it.
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, config)
        torch.manual_seed(int(np.random.SeedSequence((config.seed, step, RANK)).generate_state(1)[0]))
        x, y = get_batch(train_data, step, config.seed, config.batch_size, config.block_size)
        if config.rename:
            rng = np.random.default_rng((step, config.seed))
            windows = rename(torch.cat((x, y[:, -1:]), dim=1), config.rename, names, itos, rng)
            x, y = windows[:, :-1], windows[:, 1:]
        x, y = x[RANK::WORLD_SIZE].to(device), y[RANK::WORLD_SIZE].to(device)
        x = misread(x, config.noise)
        with autocast(device, config.precision):
            logits, loss = net(x, y)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        step += 1

        # How fast does it go? (The first two steps are slower than the rest.)
        if step in (first_step + 2, measured):
            wait_for(device)
            now = time.perf_counter()
            if step == first_step + 2:
                warm = now
            else:
                step_seconds = (now - warm) / (full_steps(first_step + 2, config) - full_steps(step, config))
                work = full_steps(0, config) / config.max_iters  # of an average step and an average evaluation
                if config.max_iters == UNLIMITED:
                    left = (60 * config.minutes - seconds - (now - clock)) / step_seconds
                    left = (left - eval_steps) / (work + work * eval_steps / config.eval_interval)
                    fit = max(step + max(1, int(left)), math.ceil(step / (config.grow_at or 1)))
                    config = replace(config, max_iters=highest(fit, device))
                    model.config = replace(config, n_layer=len(model.blocks))
                    show(f"{config.max_iters} steps fit: with --max-iters {config.max_iters} this run can be repeated")
                steps = full_steps(step, config)
                steps += math.ceil((config.max_iters - step) / config.eval_interval) * work * eval_steps
                show(f"this takes about {duration(step_seconds * steps)}")
        now = time.perf_counter()
        if config.max_iters < UNLIMITED and now - shown > (0.5 if sys.stdout.isatty() else 30):
            check(grad_norm)
            speed = tokens_per_step * (step - clock_step) / (now - clock)
            step_seconds = (now - clock) / (full_steps(clock_step, config) - full_steps(step, config))
            show(f"step {step} of {config.max_iters} | loss {loss:.4f} | {speed:,.0f} tokens/s"
                 f" | {duration(step_seconds * full_steps(step, config))} left", passing=True)
            shown = now

# ---------------------------------------------------------------------------------------------
# Sampling: what does the trained model write?

def write_sample(model, itos, seed, max_new_tokens=300):
    """Some text from the model, from a line's start on: always the same for the same weights and seed."""
    device = model.lm_head.weight.device
    idx = torch.tensor([[max(itos.find("\n"), 0)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    out = model.generate(idx, max_new_tokens, generator=generator)
    model.train()
    return decode(out[0, 1:].tolist(), itos)


def sample(config, prompt="", prompt_file=None, max_new_tokens=500, temperature=1.0, top_k=None, top_p=None,
           num_samples=1):
    """Prints texts that begin with the prompt, character by character, from the best model in config.out_dir."""
    model, checkpoint = load_checkpoint(Path(config.out_dir) / "model.pt")
    device, itos = pick_device(config.device), checkpoint["itos"]
    model.to(device).eval()
    if prompt_file:
        prompt = "".join(read_pieces(prompt_file))
    ids = encode(prompt, itos) if prompt else [max(itos.find("\n"), 0)]  # no prompt: a line begins
    idx = torch.tensor(ids, dtype=torch.long, device=device)[None]  # (1, T)
    generator = torch.Generator(device).manual_seed(config.seed)
    for i in range(num_samples):
        print("\n" * (i > 0) + prompt, end="", flush=True)
        for idx_next in model.stream(idx, max_new_tokens, temperature, top_k, top_p, generator):
            print(itos[idx_next], end="", flush=True)
        print(flush=True)

# ---------------------------------------------------------------------------------------------
# The command line: what did the user ask for, and does it make sense?

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


LIMITS = {  # the lowest and the highest value of each number that can be given
    "seed": (0, 2**63), "n_layer": (1, 100), "n_head": (1, 1000), "n_embd": (1, 10_000), "block_size": (1, 8192),
    "dropout": (0, 0.99), "batch_size": (1, 100_000), "max_iters": (1, UNLIMITED - 1), "minutes": (0.001, 10**6),
    "eval_interval": (1, 10**9), "eval_tokens": (1, 10**12), "learning_rate": (1e-9, 10), "warmup_iters": (0, 10**9),
    "weight_decay": (0, 100), "noise": (0, 1), "rename": (0, 1), "beta2": (0, 0.999999), "grad_clip": (1e-9, 1e9), "grow_at": (0, 0.95),
    "max_new_tokens": (1, 10**12), "temperature": (0, 100), "top_k": (1, 10**9), "top_p": (1e-9, 1), "num_samples": (1, 10**9),
}


def check_settings(config, given):
    """Raises UserError for the first setting given that makes no sense (NaN is outside all limits)."""
    for name, value in given.items():
        low, high = LIMITS.get(name, (value, value))
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if config.n_embd % config.n_head:
        raise UserError(f"--n-embd {config.n_embd} must be a multiple of --n-head {config.n_head}")
    if config.n_layer * config.n_embd**2 > 1e8:
        raise UserError("a model of more than 1.2 billion parameters: lower --n-layer or --n-embd")
    if config.precision not in ("", "fp32", "bf16"):
        raise UserError(f"--precision must be fp32 or bf16, not {config.precision}")


FILES = ("latest.pt", "model.pt", "log.csv", "loss.png", "sample.txt")  # what a run leaves in out_dir


def run(argv):
    """Does what the command line says and returns the exit status. Raises UserError if it makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    epilog="On a GPU these are the defaults: " + str(CUDA_DEFAULTS)[1:-1].replace("'", ""))
    add_flags(parser)
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out-dir; --max-iters may be raised, to train it for longer")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out-dir holds a run already")
    writing = parser.add_argument_group("writing with a trained model", argument_default=argparse.SUPPRESS)
    beginning = writing.add_mutually_exclusive_group()
    beginning.add_argument("--prompt", metavar="TEXT", help="how the text begins; no training takes place")
    beginning.add_argument("--prompt-file", metavar="FILE", help="a file with the text's beginning")
    writing.add_argument("--max-new-tokens", metavar="INT", type=int, help="characters to add (default 500)")
    writing.add_argument("--temperature", metavar="FLOAT", type=float,
                         help="0 takes the likeliest character, 1 (default) follows the model, more dares more")
    writing.add_argument("--top-k", metavar="INT", type=int, help="choose among the k likeliest characters")
    writing.add_argument("--top-p", metavar="FLOAT", type=float,
                         help="choose among the likeliest that together have this probability")
    writing.add_argument("--num-samples", metavar="INT", type=int, help="how many texts (default 1)")

    given = vars(parser.parse_args(argv))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    settings = {field.name: given.pop(field.name) for field in fields(Config) if field.name in given}
    defaults = CUDA_DEFAULTS if pick_device(settings.get("device")) == "cuda" else {}
    config, checkpoint = Config(**{**defaults, **settings}), None
    check_settings(config, {**settings, **given})
    out_dir = Path(config.out_dir)

    if given:
        if "prompt" not in given and "prompt_file" not in given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} is for writing: add --prompt TEXT")
        for name in settings.keys() - {"out_dir", "device", "seed"}:
            raise UserError(f"--{name.replace('_', '-')} is for training: the saved model has its own")
        sample(config, **given)
        return 0
    if resume:
        model, checkpoint = load_checkpoint(out_dir / "latest.pt")
        if "run" not in checkpoint:
            raise UserError(f"{out_dir / 'latest.pt'} holds a model alone, not a run to go on with")
        saved = Config(**checkpoint["run"])
        for name, value in settings.items():
            was = getattr(saved, name)
            if value != was and name not in ("data", "out_dir", "device", "max_iters"):
                raise UserError(f"--{name.replace('_', '-')} {value} contradicts the saved run's {was}")
        config = replace(saved, **{**settings, "out_dir": str(out_dir)})
    elif {"minutes", "max_iters"} <= settings.keys():
        raise UserError("--minutes finds out --max-iters: give one of the two")
    elif not overwrite and any((out_dir / name).exists() for name in FILES):
        raise UserError(f'{out_dir} holds a trained model already: let it write (--prompt "ROMEO:"), go on training '
                        "it (--resume), or train another in another folder (--out-dir NAME) or its place (--overwrite)")
    elif "minutes" in settings:
        config = replace(config, max_iters=0)  # not the number for a GPU
    status = train(config, checkpoint, stopped=catch_signals())
    if WORLD_SIZE > 1:
        dist.barrier()  # a process that leaves while others are at work may abort
        dist.destroy_process_group()
    return status


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # for terminals that lack some characters
    try:
        return run(argv)
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"transformer.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        print("transformer.py: out of memory: try a smaller --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
