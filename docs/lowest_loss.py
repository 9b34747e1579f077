"""
Trains the model of transformer.py with more tricks, from outside: not a line of the page is changed.

Over tens of epochs the model overfits. A third of the gap between its training and its validation loss is in names:
it memorises those of the training text and recites them, where the other text has names to be spelled. So here

- some of the names that it is shown are made up, of the beginning of one and the end of another: it learns to spell;
- some of the characters that it is shown are wrong: what it has memorised seldom fits any more;
- weight decay pulls three times as hard;
- when the learning rate has fallen to 0, training goes on for a while at a tenth of its peak, and ends with the mean
  of all weights from then on (stochastic weight averaging, Izmailov et al. 2018).

docs/experiments.md has the evidence. The tricks slow down a short run.

    python docs/lowest_loss.py                       # on two cores 2.6 hours in fp32, less with bf16
    python docs/lowest_loss.py --prompt "ROMEO:"     # all flags of transformer.py work
"""
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformer  # noqa: E402

RECIPE = ["--max-iters", "44000", "--grow-at", "0.63637", "--weight-decay", "0.3"]  # grows at step 28,000
RENAMED = 0.15     # fraction of the names that are replaced by made-up ones
MISREAD = 0.1      # fraction of the characters that are replaced by others
AVERAGED = 1 / 11  # fraction of the steps whose weights are averaged, the last ones


def find_names(text):
    """Words of three letters or more that the text never writes small, by length: {8: ["coriolan", ...], ...}.

    They are in small letters here. Most are names; some only ever begin a line.
    """
    words, names = set(re.findall(r"\w{3,}", text)), {}
    for name in sorted({word.lower() for word in words} - words):
        names.setdefault(len(name), []).append(name)
    return names


def rename(text, names, itos, rng, p=RENAMED):
    """Gives each name in a text, with probability p, another of the same length, the same throughout the text."""
    made = {}

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

    return re.sub(r"\w{3,}", new_name, text)


def misread(x, rng, p=MISREAD):
    """Replaces each integer of x (B, T), with probability p, by another one of x.

    See Xie et al. 2017, "Data Noising as Smoothing in Neural Network Language Models".
    """
    others = torch.from_numpy(rng.permutation(x.flatten().numpy())).view_as(x)
    return torch.where(torch.from_numpy(rng.random(x.shape)) < p, others, x)


def main(argv):
    """Calls transformer.main with the recipe, wherever argv begins a run, and with the changes above."""
    load_data, get_batch = transformer.load_data, transformer.get_batch
    get_lr, train_step, now = transformer.get_lr, transformer.train_step, {"nth": 0}

    def load_and_find_names(path, block_size):
        train_data, val_data, itos = load_data(path, block_size)
        beginning = transformer.decode(train_data[:10**7], itos)
        now.update(itos=itos, names=find_names(beginning))
        return train_data, val_data, itos

    def changed_batch(data, step, seed, batch_size, block_size):
        x, y = get_batch(data, step, seed, batch_size, block_size)
        rng = np.random.default_rng((step, seed))  # so that the batch still depends on seed and step alone
        windows = torch.cat((x, y[:, -1:]), dim=1).tolist()
        itos, names = now["itos"], now["names"]
        renamed = "".join(rename(transformer.decode(w, itos), names, itos, rng) for w in windows)
        windows = torch.tensor(transformer.encode(renamed, itos)).long().view(batch_size, block_size + 1)
        return misread(windows[:, :-1], rng), windows[:, 1:]

    def changed_rate(step, config):
        start = config.max_iters - int(AVERAGED * config.max_iters)  # of the averaging
        now.update(nth=step - start + 1, last=step + 1 == config.max_iters)
        return get_lr(step, replace(config, max_iters=start)) if step < start else 0.1 * config.learning_rate

    def averaging_step(net, optimizer, x, y, lr, config):
        result = train_step(net, optimizer, x, y, lr, config)
        for p in net.parameters():
            if now["nth"] > 0 and p.grad is not None:  # no gradient: it is not in use yet
                # The mean lies in the optimizer's state, which latest.pt keeps: --resume stays exact.
                mean = optimizer.state[p].setdefault("mean", p.detach().clone())
                mean.lerp_(p.detach(), 1 / now["nth"])
                if now["last"]:
                    p.data.copy_(mean)
        return result

    flags = ["--out-dir", "out/lowest_loss"]
    if not any(arg.startswith(("--resume", "--prompt")) for arg in argv):
        flags += RECIPE[2:] if any(arg.startswith("--minutes") for arg in argv) else RECIPE
    with patch.multiple(transformer, load_data=load_and_find_names, get_batch=changed_batch, get_lr=changed_rate,
                        train_step=averaging_step):
        return transformer.main(flags + argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
