"""Attention on the engine "torch": products and a softmax, where that is the same function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.lowering import attention
from tests.lowering import WithSecond, Written, folded, near
from tests.support import randomise
from tests.test_onednn import kernels

X = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(3))  # 24 tokens in two heads of 4
ATTENTION = F.scaled_dot_product_attention


def heads(y):
    return y.flatten(2).unflatten(1, (2, 4)).transpose(2, 3)


def attend(way):
    """A convolution, and attention of what it gives to itself in some way."""

    def function(m, y):
        return way(m, heads(y) / 4, heads(y.cumsum(2)) / 4, heads(y).relu())

    model = randomise(Written(function)).float()
    for axes, shape in ((2, (24, 24)), (3, (2, 24, 24)), (4, (1, 2, 24, 24))):
        setattr(model, f"mask{axes}", nn.Parameter(torch.randn(shape)))
    model.lower = nn.Parameter(
        torch.randn(24, 24).tril().masked_fill_(torch.ones(24, 24).triu(1) > 0, -torch.inf)
    )
    return fxfuse.fuse(model)


WRITTEN = {
    "no mask": lambda m, q, k, v: ATTENTION(q, k, v),
    "mask of two axes": lambda m, q, k, v: ATTENTION(q, k, v, m.mask2),
    "of three": lambda m, q, k, v: ATTENTION(q, k, v, attn_mask=m.mask3),
    "of four": lambda m, q, k, v: ATTENTION(q, k, v, m.mask4, 0.0, False),
    "that is computed from weights": lambda m, q, k, v: ATTENTION(q, k, v, m.mask3.sigmoid() + m.mask2),
    "scale": lambda m, q, k, v: ATTENTION(q, k, v, m.mask3, scale=0.3),
    "no scale": lambda m, q, k, v: ATTENTION(q, k, v, scale=0.0),
    "other keys": lambda m, q, k, v: ATTENTION(q, k[:, :, :7], v[:, :, :7]),
    "values of another size": lambda m, q, k, v: ATTENTION(q, k, v[..., :3], m.mask4),
    "one head": lambda m, q, k, v: ATTENTION(q[:, 0], k[:, 0], v[:, 0], m.mask2),
    "of aten": lambda m, q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, m.mask3),
}
KEPT = {
    "causal": lambda m, q, k, v: ATTENTION(q, k, v, is_causal=True),
    "masked with infinity": lambda m, q, k, v: ATTENTION(q, k, v, m.lower),
    "mask of bits": lambda m, q, k, v: ATTENTION(q, k, v, m.mask3 > -1),
    "mask that is computed": lambda m, q, k, v: ATTENTION(q, k, v, q @ k.transpose(2, 3)),
    "heads that share keys": lambda m, q, k, v: ATTENTION(q, k[:, :1], v[:, :1], enable_gqa=True),
    "a sample for all": lambda m, q, k, v: ATTENTION(q, k[:1], v[:1]),
}


def count():
    """How many attentions are left in what was compiled last."""
    _, left = kernels()
    return sum(number for kind, number in left.items() if "scaled_dot_product" in kind)


@pytest.mark.parametrize("way", WRITTEN)
def test_attention_is_written_out(way):
    lowered = fxfuse.lower(attend(WRITTEN[way]), (X,))
    assert not lowered.lowering.reason and count() == 0
    near(lowered, X)


@pytest.mark.parametrize("way", KEPT)
def test_attention_that_stays(way):
    lowered = fxfuse.lower(attend(KEPT[way]), (X,))
    assert not lowered.lowering.reason and count() == 1
    near(lowered, X)


def test_masks_that_are_given_may_mask_whole_rows():
    model = folded(WithSecond(lambda m, y, mask: ATTENTION(heads(y), heads(y), heads(y), mask)))
    lowered = fxfuse.lower(model, (X, torch.randn(24, 24)))
    assert not lowered.lowering.reason and count() == 1
    near(lowered, X, torch.randn(24, 24).index_fill(0, torch.tensor([1]), -torch.inf))


def test_many_keys_and_other_dtypes(monkeypatch):
    lowered = fxfuse.lower(attend(WRITTEN["no mask"]), (X,), dtype=torch.bfloat16)
    assert not lowered.lowering.reason and count() == 1
    near(lowered, X, limit=0.05)
    monkeypatch.setattr(attention, "_KEYS", 23)
    lowered = fxfuse.lower(attend(WRITTEN["no mask"]), (X,))
    assert not lowered.lowering.reason and count() == 1
