"""
A small GPT-2 from scratch: data, model, training and text generation in one file.

It follows Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out" and goes on from
there: a run is saved and can be resumed, Muon trains most weights, a KV cache saves time.

    python transformer.py                      # train; after a few steps it shows the time left
    python transformer.py --resume             # continue an interrupted run
    python transformer.py --prompt "ROMEO:"    # generate text with the trained model
    python transformer.py --help               # list all options
"""
import argparse
import io
import math
import os
import sys
import time
import timeit
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
FETCHED = HERE / "data/tinyshakespeare/input.txt"  # the lecture's text: see download.py there
TEXT = FETCHED if FETCHED.exists() else HERE / "input.txt"


class UserError(Exception):
    """Something the user can correct: shown as one line, without a traceback."""

# Hyperparameters -----------------------------------------------------------------------------

@dataclass
class Config:
    """The settings that are saved with a model. Each is also a flag: --n-layer sets n_layer."""
    # model
    n_layer: int = 6  # number of transformer blocks
    n_head: int = 6  # attention heads per block
    n_embd: int = 384  # embedding size
    block_size: int = 256  # context length in characters
    dropout: float = 0.0
    # training
    batch_size: int = 16  # sequences per training step
    max_iters: int = 1100  # training steps
    eval_interval: int = 55  # steps between evaluations; each prints a sample and saves
    optimizer: str = "muon"  # muon, or adamw as in the lecture
    learning_rate: float = 4e-3  # peak learning rate
    warmup_iters: int = 100  # steps until the peak
    weight_decay: float = 1.5  # strong, because the run sees each character four times
    grad_clip: float = 1.0  # maximum gradient norm
    seed: int = 1337
    dtype: str = ""  # precision of matrix products: float32 or bfloat16; empty: the faster one

    def __post_init__(self):
        positive = ["n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters",
                    "eval_interval", "learning_rate", "grad_clip"]
        for name, value in vars(self).items():
            smallest = 1e-9 if name in positive else 0
            if type(value) in (int, float) and not smallest <= value <= 1e9:  # true for nan, too
                raise UserError(f"{name} cannot be {value}")
        if self.n_embd % self.n_head or self.dropout >= 1:
            raise UserError("n_embd must be a multiple of n_head, and dropout below 1")
        if self.dtype not in ("", "float32", "bfloat16") or self.optimizer not in ("muon", "adamw"):
            raise UserError("dtype is float32 or bfloat16, optimizer is muon or adamw")


ADAMW = {"learning_rate": 1e-3, "weight_decay": 0.1}  # defaults with --optimizer adamw

# Data ----------------------------------------------------------------------------------------

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

# Model ---------------------------------------------------------------------------------------

def attention(q, k, v, mask, dropout=nn.Identity()):
    """softmax(q k^T / sqrt(d) + mask) v, in each head ("Attention Is All You Need", 3.2.1).

    q (B, H, T, d), k and v (B, H, S, d) -> (B, H, T, d), where H is the number of heads, d = C / H,
    and the T queries look at S positions. mask (T, S) is -inf in the future and 0 elsewhere.
    """
    wei = (q * q.size(-1)**-0.5) @ k.transpose(-2, -1)  # (B, H, T, d), (B, H, d, S) -> (B, H, T, S)
    wei += mask  # the future gets the weight exp(-inf) = 0
    wei = F.softmax(wei, dim=-1)
    wei = dropout(wei)
    return wei @ v  # (B, H, T, S), (B, H, S, d) -> (B, H, T, d)


class MultiHeadAttention(nn.Module):
    """Causal self-attention, n_head heads in parallel: communication between positions."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        mask = torch.full((config.block_size, config.block_size), float("-inf")).triu(diagonal=1)
        self.register_buffer("mask", mask, persistent=False)  # not saved

    def forward(self, x, cache=None, start=0):  # cache and start: see GPT.forward
        B, T, C = x.shape
        # A Head of the lecture has query(x), key(x) and value(x), each (B, T, d). Here one linear
        # layer computes all three for all heads, (B, T, 3 C), and a view tells them apart.
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        if cache is not None:  # (2, B, H, block_size, d): keys and values of earlier positions
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T]  # (B, H, S, d) each, S = start + T
        out = attention(q, k, v, self.mask[start:start + T, :start + T], self.dropout)
        out = out.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    """A linear layer, a non-linearity, a linear layer: computation at each position."""

    def __init__(self, config):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(approximate="tanh"),  # GPT-2's; the lecture has nn.ReLU()
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
        self.ln_f = nn.LayerNorm(config.n_embd)  # final layer norm
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding_table.weight  # tied: the same table

        # All weights start as noise. Each block adds two projections to the residual stream,
        # 2 n_layer in all: they start smaller, so that their sum does not grow with n_layer.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                is_projection = name.endswith(("sa.proj.weight", "ffwd.net.2.weight"))
                std = 0.02 / math.sqrt(2 * config.n_layer) if is_projection else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, start=0):
        """idx, targets (B, T) integers -> logits (B, T, vocab_size), mean loss in nats (or None).

        With a cache, idx holds only the tokens from position `start` on; the cache has the keys and
        values of all earlier ones. start + T must not exceed block_size.
        """
        B, T = idx.shape
        tok_emb = self.token_embedding_table(idx)  # (B, T, C)
        pos_emb = self.position_embedding_table.weight[start:start + T]  # (T, C)
        x = self.dropout(tok_emb + pos_emb)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, generator=None, **sampling):
        """Yields tokens that continue idx, (B, T), one by one, (B, 1) each. Call eval() first."""
        config = self.config
        # the KV cache of each block: room for keys and values of block_size positions
        cache = self.lm_head.weight.new_empty(config.n_layer, 2, len(idx), config.n_head,
                                              config.block_size, config.n_embd // config.n_head)
        context = idx[:, -config.block_size:]  # crop idx to the last block_size tokens
        start = 0  # how many of them are in the cache
        for _ in range(max_new_tokens):
            # When the context no longer fits, keep its last half. All its positions change, so
            # nothing in the cache is valid any more.
            if context.size(1) > config.block_size:
                context, start = context[:, -max(1, config.block_size // 2):], 0
            # get the predictions for what is not in the cache yet, mostly one token
            logits, _ = self(context[:, start:], cache=cache, start=start)
            start = context.size(1)
            # focus only on the last position
            probs = next_token_probs(logits[:, -1], **sampling)  # (B, vocab_size)
            # sample from the distribution
            idx_next = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
            # append it to the context
            context = torch.cat((context, idx_next), dim=1)
            yield idx_next


def next_token_probs(logits, temperature=1.0, top_k=10**9, top_p=1.0):
    """The distribution to sample from, (B, vocab_size) like logits."""
    # a temperature below 1 sharpens the distribution; 0 is greedy
    probs = F.softmax(logits.float() / max(temperature, 1e-30), dim=-1)
    probs, order = probs.sort(dim=-1, descending=True)
    # top-k: keep the k most likely tokens
    probs[:, top_k:] = 0
    # top-p: of these, the fewest with a share of at least p (Holtzman et al. 2020, section 3.1)
    cumulative = probs.cumsum(dim=-1) - probs  # the total of all more likely tokens
    probs[cumulative >= max(top_p, 1e-9) * probs.sum(dim=-1, keepdim=True)] = 0
    probs = torch.zeros_like(probs).scatter(-1, order, probs)  # back into vocabulary order
    return probs / probs.sum(dim=-1, keepdim=True)


def sample(model, itos, prompt="", max_new_tokens=150, seed=1337, **sampling):
    """Yields the prompt, then characters that continue it, one by one; see next_token_probs."""
    model.eval()
    device = model.lm_head.weight.device
    ids = encode(prompt, itos) if prompt else [0]  # like the lecture, start from token 0
    idx = torch.tensor(ids, dtype=torch.long, device=device)[None]  # (1, T)
    generator = torch.Generator(device).manual_seed(seed)
    yield prompt
    for idx_next in model.generate(idx, max_new_tokens, generator, **sampling):
        yield decode(idx_next[0], itos)

# Optimizers ----------------------------------------------------------------------------------

def orthogonalize(G):
    """Approximately U V^T for a matrix G = U S V^T: all its singular values become about 1."""
    if G.size(0) > G.size(1):
        return orthogonalize(G.T).T  # so that X X^T is the smaller product
    X, I = G / (G.norm() + 1e-7), torch.eye(len(G)).to(G)  # now no singular value is above 1
    # Newton-Schulz iteration, faster than an SVD. X X^T X is U S^3 V^T, so that each singular value
    # s becomes a s + b s^3 + c s^5. With these numbers five steps suffice (Jordan et al. 2024).
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        A = X @ X.T
        X = (a * I + b * A + c * A @ A) @ X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, "Muon"), with products in dtype.

    AdamW scales each number by itself and follows the few strong directions (singular vectors) of
    a matrix's gradients. Muon makes them about equally strong: the weak ones are learned, too.
    """

    def __init__(self, params, weight_decay, dtype, momentum=0.95):
        super().__init__(params, dict(weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])  # Nesterov momentum
                update = orthogonalize(update.to(self.dtype))
                # entries of about 0.2, as AdamW's updates have (Liu et al. 2025, section 2.2)
                update *= 0.2 * math.sqrt(max(p.shape))
                p -= group["lr"] * (update + group["weight_decay"] * p)  # train sets the rate


def make_optimizers(model, config):
    """AdamW and Muon, or only AdamW; weight decay is for matrices (Radford et al. 2018, 4.1).

    Muon is for the matrices in the blocks. Jordan et al. 2024 found AdamW better for embeddings,
    and so for the tied output layer; biases and layer norms have no directions to balance.
    """
    for_muon, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif config.optimizer == "muon" and name.startswith("blocks."):
            for_muon.append(p)
        else:
            matrices.append(p)
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return [adamw, Muon(for_muon, config.weight_decay, dtype)] if for_muon else [adamw]

# Learning rate, precision, evaluation, checkpoints -------------------------------------------

def get_lr(step, config):
    """Learning rate: linear warm-up to config.learning_rate, then linear decay to 0."""
    warmup_iters = min(config.warmup_iters, config.max_iters // 2)  # at most half of the run
    warmup = (step + 1) / (warmup_iters + 1)
    decay = (config.max_iters - step) / (config.max_iters - warmup_iters)
    return config.learning_rate * min(warmup, decay)  # the two lines meet at the peak


def fastest_dtype(device):
    """The faster of float32 and bfloat16 for matrix products; on a CPU, by trying."""
    def seconds(dtype):
        a, b = torch.ones(512, 384, dtype=dtype), torch.ones(384, 768, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=3))
    if device == "cpu":
        faster = seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
    else:
        faster = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    choice = ["bfloat16" if faster else "float32"]
    if dist.is_initialized():
        dist.broadcast_object_list(choice)  # every process takes that of rank 0
    return choice[0]


@torch.no_grad()
def estimate_loss(model, data, max_tokens):
    """Mean loss in nats on about max_tokens of data: evenly spaced windows, always the same."""
    model.eval()
    config, device = model.config, model.lm_head.weight.device
    windows = torch.from_numpy(data).unfold(0, config.block_size + 1, config.block_size)  # (N, T+1)
    windows = windows[::math.ceil(len(data) / max_tokens)]  # every n-th
    total = 0.0
    for batch in windows.split(32):
        batch = batch.long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits, loss = model(batch[:, :-1], batch[:, 1:])
        total += loss.item() * len(batch)
    return total / len(windows)


def save_checkpoint(path, checkpoint):
    """Replaces the file atomically: at any moment it is the old one or the new one, complete."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)  # in memory first: its own error for a full disk is obscure
    tmp = path.with_suffix(".tmp")
    with open(tmp, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # wait until it is on the disk
    tmp.replace(path)


def load_checkpoint(path):
    """Returns the saved model, on the CPU, and the whole checkpoint, a dictionary."""
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)  # never executes code in it
        model = GPT(Config(**checkpoint["config"]), len(checkpoint["itos"]))
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # a damaged file raises errors of many kinds
        raise UserError(f"cannot load a model from {path}, train one first ({error!r:.100})")
    return model, checkpoint

# Training ------------------------------------------------------------------------------------

def join_processes(device):
    """Returns rank and world size: among the processes that torchrun started, or 0 and 1."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
    return dist.get_rank(), dist.get_world_size()


def start_run(args, settings):
    """Returns model, optimizers, [train_data, val_data], run: new, or continued from latest.pt."""
    saved = {}
    if args.resume:
        _, saved = load_checkpoint(args.out_dir / "latest.pt")
        changed = {name for name in settings if settings[name] != saved["config"].get(name)}
        if changed - {"max_iters", "eval_interval"}:
            raise UserError("--resume keeps all settings but max_iters and eval_interval")
        settings = saved["config"] | settings
    elif settings.get("optimizer") == "adamw":
        settings = ADAMW | settings  # a flag that was given counts
    config = Config(**settings)
    path = os.path.abspath(args.data or saved.get("path", TEXT))
    *splits, itos = load_data(path, config.block_size)
    config.dtype = config.dtype or fastest_dtype(args.device)
    torch.manual_seed(config.seed)
    model = GPT(config, len(itos)).to(args.device)
    optimizers = make_optimizers(model, config)
    # what latest.pt holds besides weights and settings: which text, and how far training has come
    run = {"path": path, "itos": itos, "checksum": zlib.crc32(np.concatenate(splits)),
           "step": 0, "seconds": 0.0, "grad_norm": 0.0, "log": {}}
    if args.resume:
        if any(run[name] != saved.get(name) for name in ("itos", "checksum")):
            raise UserError(f"{path} is not the text of the saved run")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        run = {name: saved[name] for name in run} | {"path": path}
        if config.max_iters < run["step"]:
            raise UserError(f"{run['step']} steps are done: --max-iters cannot be lower")
    return model, optimizers, splits, run


def evaluate_and_save(model, optimizers, splits, run, out_dir):
    """Computes losses, saves the run, and the model if it is the best yet, and prints a sample."""
    config, step, log = model.config, run["step"], run["log"]
    train_loss, val_loss = (estimate_loss(model, data, 5_000) for data in splits)
    if not math.isfinite(train_loss + val_loss):
        raise UserError(f"training diverged by step {step}: restart with a lower --learning-rate")
    log[step] = (step, run["seconds"], get_lr(step, config), run["grad_norm"], train_loss, val_loss)
    checkpoint = {"model": model.state_dict(), "config": vars(config), "itos": run["itos"]}
    if val_loss == min(row[-1] for row in log.values()):
        save_checkpoint(out_dir / "model.pt", checkpoint)
    states = [optimizer.state_dict() for optimizer in optimizers]
    save_checkpoint(out_dir / "latest.pt", run | checkpoint | {"optimizers": states})

    # what only shows the run comes last: if it fails, nothing is lost
    print(f"\nstep {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    print("".join(sample(model, run["itos"])), end="\n\n", flush=True)
    try:
        np.savetxt(out_dir / "log.csv", list(log.values()), fmt="%.9g", delimiter=",", comments="",
                   header="step,seconds,learning_rate,grad_norm,train_loss,val_loss")
    except OSError as error:  # open in Excel, perhaps; the next evaluation writes all of it
        print(f"log.csv could not be written: {error}", file=sys.stderr)


def train(args, settings):
    """Trains a new model, or continues a saved run, until max_iters steps are done."""
    device, out_dir = args.device, args.out_dir
    rank, world_size = join_processes(device)  # with torchrun, processes share each batch
    model, optimizers, splits, run = start_run(args, settings)
    config = model.config
    if config.batch_size % world_size:
        raise UserError(f"batch_size must be a multiple of {world_size}, the number of processes")
    if rank == 0:
        if not args.resume:
            out_dir.mkdir(parents=True, exist_ok=args.overwrite)  # fails if it exists
            (out_dir / "latest.pt").unlink(missing_ok=True)  # no longer to be resumed
        print(f"{run['path']}: {sum(map(len, splits)):,} characters, {len(run['itos'])} distinct")
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, {config.dtype} on {device}", flush=True)
    wrapped = model  # for training steps; model, with the same weights, for evaluating and saving
    if device == "cuda":
        torch._dynamo.config.suppress_errors = True  # if compiling fails, run uncompiled
        wrapped = torch.compile(model)
    if world_size > 1:  # averages the gradients of all processes
        wrapped = nn.parallel.DistributedDataParallel(wrapped)

    for step in range(run["step"], config.max_iters):
        if rank == 0 and step % config.eval_interval == 0:
            evaluate_and_save(model, optimizers, splits, run, out_dir)
        t0 = time.perf_counter()
        torch.manual_seed(config.seed + step * world_size + rank)  # resumed: the same dropout
        xb, yb = get_batch(splits[0], step, config.seed, config.batch_size, config.block_size)
        xb, yb = xb[rank::world_size].to(device), yb[rank::world_size].to(device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, config)
        model.train()  # evaluating has switched dropout off

        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits, loss = wrapped(xb, yb)
        model.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()

        run["step"], run["grad_norm"] = step + 1, grad_norm.item()  # item() waits for the GPU
        dt = time.perf_counter() - t0
        run["seconds"] += dt
        if rank == 0 and run["step"] % 10 == 0:
            print(f"step {step + 1} of {config.max_iters}: loss {loss:.4f}, gradient norm "
                  f"{grad_norm:5.2f}, {dt * (config.max_iters - step - 1) / 60:5.1f} min left",
                  end="\r" if sys.stdout.isatty() else "\n", flush=True)

    if rank == 0:
        evaluate_and_save(model, optimizers, splits, run, out_dir)
        best, _ = load_checkpoint(out_dir / "model.pt")
        n = min(len(splits[1]), 500_000)
        print(f"best model, on up to {n:,} characters of each split: ", end="", flush=True)
        train_loss, val_loss = (estimate_loss(best.to(device), data, n) for data in splits)
        print(f"train loss {train_loss:.4f}, val loss {val_loss:.4f}\n--prompt generates text")
    if dist.is_initialized():
        dist.barrier()  # leaving right after the last step can end in a deadlock of gloo's threads
        dist.destroy_process_group()

# Command line --------------------------------------------------------------------------------

def generate_text(args, seed):
    """Prints a text that begins with the prompt, from the best model in out_dir."""
    if not (0 <= args.temperature < math.inf and 0 < args.top_p <= 1
            and min(args.top_k, args.max_new_tokens) > 0):
        raise UserError("need temperature >= 0, 0 < top_p <= 1, top_k >= 1, max_new_tokens >= 1")
    model, checkpoint = load_checkpoint(args.out_dir / "model.pt")
    if unknown := set(args.prompt) - set(checkpoint["itos"]):
        raise UserError(f"not in the model's vocabulary: {unknown}")
    torch.set_num_threads(1)  # one token at a time is too little work to share
    for piece in sample(model.to(args.device), checkpoint["itos"], args.prompt, args.max_new_tokens,
                        seed, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p):
        print(piece, end="", flush=True)
    print()


def main(argv=None):
    parser = argparse.ArgumentParser("transformer.py", "python transformer.py [options]",
                                     epilog="Config in the script explains the hyperparameters.")
    flag = parser.add_argument
    flag("--data", help="text to train on, UTF-8 (default: Tiny Shakespeare or input.txt)")
    flag("--out-dir", type=Path, default="out/transformer", help="folder of the run")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    devices = ["cuda"] * cuda + ["cpu"] + ["mps"] * mps
    flag("--device", choices=devices, default=devices[0], help="default: %(default)s")
    flag("--resume", action="store_true", help="continue the run in out_dir")
    flag("--overwrite", action="store_true", help="replace the run in out_dir")
    flag("--prompt", help="generate text that begins like this, instead of training")
    flag("--max-new-tokens", type=int, default=500, help="characters to generate (default: 500)")
    flag("--temperature", type=float, default=1.0, help="below 1 more predictable, 0: greedy")
    flag("--top-k", type=int, default=10**9, help="sample from the k most likely characters")
    flag("--top-p", type=float, default=1.0, help="sample from the fewest with probability p")
    for f in fields(Config):
        if f.type in (int, float, str):  # but not bool, which would read "False" as true
            other = f", with adamw: {ADAMW[f.name]}" if f.name in ADAMW else ""
            name = "--" + f.name.replace("_", "-")
            flag(name, type=f.type, help=f"default: {f.default!r}{other}")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()  # generate_text sets another number
    # the hyperparameters that were given as flags; those that were not are None
    settings = {k: v for k, v in vars(args).items() if hasattr(Config, k) and v is not None}
    try:
        if args.prompt is None:
            train(args, settings)
        else:
            generate_text(args, Config(**settings).seed)
    except KeyboardInterrupt:
        can_resume = args.prompt is None and (args.out_dir / "latest.pt").exists()
        print("\n--resume continues from the last save" if can_resume else "", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as after "| head": send the rest nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FileExistsError as error:
        parser.error(f"{error.filename} already exists: use --resume to continue its run, --prompt "
                     "to generate text, --overwrite, or another --out-dir")
    except (UserError, OSError) as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # there is none under pythonw
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main())
