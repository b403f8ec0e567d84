"""Attention on the engine "torch": products and a softmax, where that is the same function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.lowering import attention
from tests.lowering import ENGINES, WithSecond, Written, folded, near, needs_bfloat16
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
    model.empty = nn.Parameter(torch.randn(24, 24).index_fill_(0, torch.tensor([2]), -torch.inf))
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
    "a row masked altogether": lambda m, q, k, v: ATTENTION(q, k, v, m.empty),
    "another dtype": lambda m, q, k, v: ATTENTION(*(each.double() for each in (q, k, v))).float(),
    "mask of bits": lambda m, q, k, v: ATTENTION(q, k, v, m.mask3 > -1),
    "mask that is computed": lambda m, q, k, v: ATTENTION(q, k, v, q @ k.transpose(2, 3)),
    "heads that share keys": lambda m, q, k, v: ATTENTION(q, k[:, :1], v[:, :1], enable_gqa=True),
    "one query": lambda m, q, k, v: ATTENTION(q[:, :, :1], k, v, m.mask2[:1]),
    "a sample for all": lambda m, q, k, v: ATTENTION(q, k[:1], v[:1]),
}


def count():
    """How many attentions are left in what was compiled last; their products are there if there is none."""
    inside, left = kernels()
    names = [*left.elements(), *(f"aten::{name}" for kernel in inside for name in kernel)]
    found = names.count("aten::scaled_dot_product_attention")
    assert found or (names.count("aten::matmul"), names.count("aten::softmax")) == (2, 1)
    return found


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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_rows_that_a_given_mask_leaves_nothing_for_are_zero(engine, dtype):
    def function(_, y, mask):
        mask = mask[:, None, None] if dtype is torch.bool else mask
        return ATTENTION(heads(y) / 4, heads(y) / 4, heads(y), mask)

    none = torch.ones(2, 24, dtype=torch.bool), torch.randn(24, 24)
    some = (
        none[0].index_fill(0, torch.tensor([1]), False),
        none[1].index_fill(0, torch.tensor([3]), -torch.inf),
    )
    place = int(dtype is torch.float32)
    lowered = fxfuse.lower(folded(WithSecond(function)), (X, none[place]), engine)
    expected = lowered.folded(X, some[place])
    assert not lowered.lowering.reason and bool((expected == 0).all(-1).any())
    torch.testing.assert_close(lowered(X, some[place]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_modules_that_attend_under_given_masks_run_as_they_were_folded(engine):
    def function(m, y, mask):
        tokens = y.flatten(2).mT
        return m.attend(tokens, tokens + 1, tokens, key_padding_mask=mask, need_weights=False)[0]

    model = randomise(WithSecond(function, attend=nn.MultiheadAttention(8, 2, batch_first=True))).float()
    none = torch.zeros(2, 24, dtype=torch.bool)
    lowered = fxfuse.lower(fxfuse.fuse(model), (X, none), engine)
    assert "masks that are computed" in lowered.lowering.reason
    some = none.index_fill(0, torch.tensor([1]), True)
    torch.testing.assert_close(lowered(X, some), model(X, some), equal_nan=True)


def attending(heads=2, **options):
    return nn.MultiheadAttention(8, heads, batch_first=True, **options)


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True)


# Modules that attend, how they are called, and whether torch takes its fast path, with contiguous results.
ATTENDING = {
    "to itself": (attending(), lambda m, y: m.attend(y, y, y)[0], True),
    "with a single head": (attending(1), lambda m, y: m.attend(y, y, y)[0], False),
    "without biases": (attending(bias=False), lambda m, y: m.attend(y, y, y)[0], False),
    "to another": (attending(), lambda m, y: m.attend(y, y + 1, y)[0], False),
    "in an encoder": (encoder(), lambda m, y: m.attend(y), True),
    "in several": (
        nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False),
        lambda m, y: m.attend(y),
        True,
    ),
}


@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("way", ATTENDING)
def test_what_modules_that_attend_give_is_laid_out_as_it_was(way, batch):
    """For attention to itself torch has kernels that are not taken while functions are watched."""
    module, attend, is_contiguous = ATTENDING[way]
    x = torch.randn(batch, 3, 4, 4)
    lowered = fxfuse.lower(folded(Written(lambda m, y: attend(m, y.flatten(2).mT), attend=module)), (x,))
    assert not lowered.lowering.reason
    near(lowered, x)
    with torch.no_grad():
        expected = lowered.folded(x)
        assert lowered(x).stride() == expected.stride()
    assert expected.is_contiguous() == is_contiguous


def test_what_is_laid_out_as_it_was_is_kept():
    """The kernel gives the layout of the queries, a product another one, of which there may be no view."""

    def attend(_, y):
        q = y.flatten(2)
        y += 1  # a write to what has a view, so that channels stay where they are
        q = q.mT.contiguous().view(2, 24, 2, 4).transpose(1, 2)
        return ATTENTION(q, q.sigmoid(), q).transpose(1, 2).view(2, 24, 8)

    lowered = fxfuse.lower(folded(Written(attend)), (X,))
    assert not lowered.lowering.reason and count() == 1
    near(lowered, X)


def test_what_is_written_through_a_view_of_the_result():
    def attend(_, y):
        result = ATTENTION(*[y.flatten(2).mT.contiguous().unflatten(2, (2, 4)).transpose(1, 2)] * 3)
        result.transpose(1, 2).reshape(2, 24, 8).clamp_(max=20.0)
        return result

    model = folded(Written(attend))
    lowered = fxfuse.lower(model, (X,))
    with torch.no_grad():  # else there is another kernel
        assert model(50 * X).amax() == 20 > model(X).amax()
        for x in (X, 50 * X):
            assert torch.allclose(lowered(x), model(x), rtol=1e-4, atol=1e-4)


@needs_bfloat16
def test_another_dtype():
    lowered = fxfuse.lower(attend(WRITTEN["no mask"]), (X,), dtype=torch.bfloat16)
    assert not lowered.lowering.reason and count() == 1
    near(lowered, X, limit=0.05)


def test_many_keys(monkeypatch):
    monkeypatch.setattr(attention, "_LARGEST", 2 * 2 * 24 * 24 - 1)
    lowered = fxfuse.lower(attend(WRITTEN["no mask"]), (X,))
    assert not lowered.lowering.reason and count() == 1


EMPTY = {
    "attention": lambda m, q, k, v: ATTENTION(q, k[:, :, :0], v[:, :, :0]).add(q),
    "products": lambda m, q, k, v: ((q @ k[:, :, :0].mT) * 0.5).softmax(-1) @ v[:, :, :0] + q,
}


@pytest.mark.parametrize("way", EMPTY)
def test_no_keys(way):
    """On empty products oneDNN Graph divides by zero, which ends the process."""
    model = attend(EMPTY[way])
    lowered = fxfuse.lower(model, (X,))
    assert "a value in it is empty" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))
