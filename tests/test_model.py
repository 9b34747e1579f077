"""The GPT: is it GPT-2? Against formulas, and against PyTorch's own transformer layers."""
import math

import pytest
import torch
import torch.nn as nn
from conftest import tiny_model
from torch.nn import functional as F

import transformer
from transformer import Config, GPT


class PyTorchGPT2(nn.Module):
    """The same network put together from PyTorch's own layers, with the weights of a GPT."""

    def __init__(self, gpt):
        super().__init__()
        c = gpt.config
        self.wte, self.wpe = nn.Parameter(gpt.lm_head.weight.clone()), nn.Parameter(gpt.position_embedding_table.weight.clone())
        layer = nn.TransformerEncoderLayer(c.n_embd, c.n_head, 4 * c.n_embd, dropout=0.0, batch_first=True, norm_first=True,
                                           activation=lambda x: F.gelu(x, approximate="tanh"), layer_norm_eps=1e-5)
        self.layers = nn.TransformerEncoder(layer, c.n_layer, nn.LayerNorm(c.n_embd), enable_nested_tensor=False)
        for theirs, ours in zip(self.layers.layers, gpt.blocks):
            attn = theirs.self_attn
            attn.in_proj_weight.data, attn.in_proj_bias.data = ours.sa.qkv.weight.data, ours.sa.qkv.bias.data
            for to, source in [(attn.out_proj, ours.sa.proj), (theirs.linear1, ours.ffwd.net[0]), (theirs.linear2, ours.ffwd.net[2]),
                               (theirs.norm1, ours.ln1), (theirs.norm2, ours.ln2), (self.layers.norm, gpt.ln_f)]:
                to.load_state_dict(source.state_dict())

    def forward(self, idx, targets):
        T = idx.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        x = self.layers(self.wte[idx] + self.wpe[:T], mask=mask, is_causal=True)
        logits = x @ self.wte.T
        return logits, F.cross_entropy(logits.transpose(1, 2), targets)


@pytest.mark.parametrize("T", [1, 5, 16])
def test_computes_what_pytorchs_own_layers_compute(T):
    ours = tiny_model(n_layer=3, n_head=4, n_embd=32).train()
    theirs = PyTorchGPT2(ours).train()
    idx, targets = torch.randint(11, (2, 3, T)).unbind()
    (our_logits, our_loss), (their_logits, their_loss) = ours(idx, targets), theirs(idx, targets)
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)

    our_loss.backward()
    their_loss.backward()
    pairs = [(ours.lm_head.weight, theirs.wte), (ours.position_embedding_table.weight, theirs.wpe)]
    for layer, block in zip(theirs.layers.layers, ours.blocks):
        pairs += [(block.sa.qkv.weight, layer.self_attn.in_proj_weight), (block.ffwd.net[2].bias, layer.linear2.bias),
                  (block.ln1.weight, layer.norm1.weight)]
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_later_tokens_change_nothing_before_them():
    model = tiny_model()
    idx = torch.randint(11, (2, 16))
    logits, _ = model(idx)
    for t in range(1, 16):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 11
        assert torch.equal(model(changed)[0][:, :t], logits[:, :t])
        assert not torch.allclose(model(changed)[0][:, t], logits[:, t])


def test_dropout_zeroes_the_share_asked_for_wherever_gpt2_has_it():
    """Only in training: on the embeddings, on attention's weights, and on what the two parts of a block add."""
    torch.manual_seed(0)
    model = tiny_model(dropout=0.25)
    idx, seen = torch.randint(11, (4, 16)), []

    def share(module, x, out):  # attention's weights have zeros already, where the future is
        seen.append((out == 0)[x[0] != 0].float().mean().item())

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(share)
    assert torch.equal(model(idx)[0], model(idx)[0]) and max(seen) == 0
    seen.clear()
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    assert len(seen) == 2 * (1 + 3 * 2) and all(0.15 < dropped < 0.35 for dropped in seen)
    weights = transformer.attention(*torch.ones(2, 1, 1, 200, 4), torch.eye(200)[None, None], torch.zeros(200, 200), nn.Dropout(0.25))
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert weights.mean().item() == pytest.approx(1 / 200, rel=0.05)  # the rest is scaled, to keep the mean


def test_the_default_model_at_its_start():
    """10,770,816 parameters, the loss of guessing, and GPT-2's initialisation."""
    torch.manual_seed(0)
    model = GPT(Config(), 65)
    assert sum(p.numel() for p in model.parameters()) == 10_770_816
    idx, targets = torch.randint(65, (2, 4, 256)).unbind()
    assert model(idx, targets)[1].item() == pytest.approx(math.log(65), abs=0.1)
    assert model.blocks[0].sa.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for weight in (model.blocks[1].sa.proj.weight, model.blocks[0].ffwd.net[2].weight):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 6), rel=0.02)
    assert model.lm_head.weight is model.token_embedding_table.weight
    assert model.position_embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all((p == (1 if name.endswith("weight") else 0)).all() for name, p in model.named_parameters() if p.dim() == 1)


def test_no_tensor_is_left_on_the_cpu():
    """On PyTorch's meta device, which computes shapes only: forward, backward, an optimizer step, generation."""
    model, idx = tiny_model(dropout=0.1).to("meta").train(), torch.zeros(2, 16, dtype=torch.long, device="meta")
    logits, loss = model(idx, idx)
    loss.backward()
    adamw, muon = transformer.make_optimizers(model, model.config)
    muon.param_groups[0]["lr"] = 0.1
    muon.step()
    torch.optim.AdamW([{**group, "fused": False} for group in adamw.param_groups]).step()
    assert logits.shape == (2, 16, 11) and model(idx)[1] is None
    assert [token.shape for token in model.generate(idx, 40, top_k=3, top_p=0.9)] == [(2, 1)] * 40
