"""flash_dynamic_mask_attention_forward, against the definitions of reference.py."""

from types import SimpleNamespace

import pytest
import torch

import reference
from flash_dmattn.integrations import flash_dynamic_mask_attention as integration
from flash_dmattn.integrations.flash_dynamic_mask_attention import flash_dynamic_mask_attention_forward

B, H, HK, Q, K, D, WINDOW = 2, 4, 2, 24, 30, 8, 7
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def inputs():
    """Heads first: query, key, value, score (B, Hk, K)."""
    torch.manual_seed(0)
    return torch.randn(B, H, Q, D), torch.randn(B, HK, K, D), torch.randn(B, HK, K, D), torch.rand(B, HK, K)


@pytest.fixture
def calls(monkeypatch):
    """What the attention function was called with."""
    calls = []
    make = integration.flash_dmattn_func_auto

    def make_spy(backend=None):
        def attention(query, key, value, **kwargs):
            calls.append(SimpleNamespace(backend=backend, query=query, key=key, value=value, **kwargs))
            return make(backend=backend)(query, key, value, **kwargs)

        return attention

    monkeypatch.setattr(integration, "flash_dmattn_func_auto", make_spy)
    return calls


def padding():
    """(B, K) bool: the first of batch 1 is padding."""
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[1, :5] = False
    return mask


def causal():
    return reference.causal_mask(Q, K)[None, None].expand(B, 1, Q, K)


def arbitrary():
    """A mask that is not causality and padding; differs between KV heads."""
    mask = torch.rand(B, HK, Q, K, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, 0, 3] = False
    return mask


def expected(query, key, value, visible, bias=None, **kwargs):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return reference.attention(query, key, value, bias, visible, **kwargs)[0]


def additive(mask, lowest=LOWEST):
    return torch.where(mask, 0.0, lowest)


def attend(inputs, mask, module=None, **kwargs):
    query, key, value, score = inputs
    bias = score[:, :, None, :].expand(-1, -1, Q, -1)
    out, weights = flash_dynamic_mask_attention_forward(module, query, key, value, mask, bias, **kwargs)
    assert weights is None
    return out


PADDED_MASKS = {
    "(B, K) bool": padding,
    "(B, K) int": lambda: padding().long(),
    "(B, K) additive": lambda: additive(padding()),
    "(B, 1, 1, K) bool": lambda: padding()[:, None, None],
    "expanded over queries": lambda: padding()[:, None, None].expand(B, HK, Q, K),
    "(B, 1, Q, K) bool": lambda: causal() & padding()[:, None, None],
    "(B, 1, Q, K) additive": lambda: additive(causal() & padding()[:, None, None]),
    "(B, 1, Q, K) additive, infinite": lambda: additive(causal() & padding()[:, None, None], -torch.inf),
    "expanded over heads": lambda: (causal() & padding()[:, None, None]).expand(B, HK, Q, K),
    "of equal heads": lambda: (causal() & padding()[:, None, None]).repeat(1, HK, 1, 1),
}


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("mask", PADDED_MASKS.values(), ids=PADDED_MASKS)
def test_causality_and_padding_end_on_the_linear_path(inputs, calls, mask, window):
    query, key, value, score = inputs
    out = attend(inputs, mask(), keep_window_size=window)
    visible = reference.dynamic_mask(score, K if window is None else window, Q, key_padding_mask=padding())
    torch.testing.assert_close(out, expected(query, key, value, visible, score[:, :, None, :]))
    (call,) = calls
    assert call.is_causal and call.attn_mask.shape == (B, 1, 1, K)


@pytest.mark.parametrize("mask", [lambda: None, causal, lambda: additive(causal())], ids=["none", "bool", "additive"])
def test_causality_alone_leaves_no_mask(inputs, calls, mask):
    query, key, value, score = inputs
    out = attend(inputs, mask(), keep_window_size=WINDOW)
    visible = reference.dynamic_mask(score, WINDOW, Q)
    torch.testing.assert_close(out, expected(query, key, value, visible, score[:, :, None, :]))
    assert calls[0].attn_mask is None and calls[0].is_causal


@pytest.mark.parametrize("is_causal", [False, True])
def test_any_other_mask_selects_the_best_of_each_row(inputs, is_causal):
    query, key, value, score = inputs
    out = attend(inputs, arbitrary(), is_causal=is_causal, keep_window_size=WINDOW)
    visible = arbitrary() & causal() if is_causal else arbitrary()
    visible = reference.select(score, visible, WINDOW)
    torch.testing.assert_close(out, expected(query, key, value, visible, score[:, :, None, :]))
    if not is_causal:
        assert out[0, 3, : H // HK].eq(0).all()  # a query that sees no key


def test_a_mask_with_one_more_visible_key_is_not_taken_for_causal(inputs, calls):
    mask = causal().clone()
    mask[0, 0, 2, K - 1] = True
    attend(inputs, mask, is_causal=False)
    assert calls[0].attn_mask.shape == (B, 1, Q, K) and not calls[0].is_causal


def test_not_causal(inputs):
    query, key, value, score = inputs
    out = attend(inputs, padding(), is_causal=False, keep_window_size=WINDOW)
    visible = reference.dynamic_mask(score, WINDOW, Q, is_causal=False, key_padding_mask=padding())
    torch.testing.assert_close(out, expected(query, key, value, visible, score[:, :, None, :]))


def test_options_come_from_the_module_unless_given(inputs, calls):
    module = SimpleNamespace(is_causal=False, keep_window_size=WINDOW)
    attend(inputs, None, module)
    attend(inputs, None, module, is_causal=True, keep_window_size=WINDOW + 1)
    attend(inputs, None, SimpleNamespace())
    options = [(call.is_causal, call.keep_window_size) for call in calls]
    assert options == [(False, WINDOW), (True, WINDOW + 1), (True, None)]


@pytest.mark.parametrize(("window", "applies"), [(K - 1, True), (K, False), (K + 1, False)])
def test_the_dynamic_mask_applies_where_there_are_more_keys_than_it_keeps(inputs, calls, window, applies):
    attend(inputs, None, keep_window_size=window)
    assert (calls[0].keep_window_size is not None) == applies


def test_scale_softcap_and_their_names(inputs):
    query, key, value, score = inputs
    want = expected(query, key, value, causal(), score[:, :, None, :], scale=0.3, softcap=2.0)
    torch.testing.assert_close(attend(inputs, None, scaling=0.3, softcap=2.0), want)
    torch.testing.assert_close(attend(inputs, None, scale=0.3, softcap=2.0), want)


def test_inputs_are_read_in_place(inputs, calls):
    attend(inputs, None)
    for tensor, name in zip(inputs, ("query", "key", "value"), strict=False):
        passed = getattr(calls[0], name)
        assert passed.data_ptr() == tensor.data_ptr() and passed.shape == tensor.transpose(1, 2).shape


@pytest.mark.parametrize(("implementation", "backend"), [(None, None), ("flash_dmattn", None), ("cpu", "cpu")])
def test_implementation_names_the_backend(inputs, calls, implementation, backend):
    attend(inputs, None, implementation=implementation)
    assert calls[0].backend == backend


def test_gradients(inputs):
    bias_and_window = {"keep_window_size": WINDOW}
    gradients = []
    for run in ("library", "reference"):
        query, key, value, score = (x.clone().double().requires_grad_() for x in inputs)
        if run == "library":
            bias = score[:, :, None, :].expand(-1, -1, Q, -1)
            mask = causal() & padding()[:, None, None]
            out, _ = flash_dynamic_mask_attention_forward(None, query, key, value, mask, bias, **bias_and_window)
        else:
            visible = reference.dynamic_mask(score.detach(), WINDOW, Q, key_padding_mask=padding())
            out = expected(query, key, value, visible, score[:, :, None, :])
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients.append(torch.autograd.grad((out * weights).sum(), (query, key, value, score)))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": torch.full((B, 1, Q, K), -0.5)}, "attention_mask .* must be additive"),
        ({"mask": torch.ones(B, 1, Q, K)}, "attention_mask .* must be additive"),
        ({"mask": torch.ones(B, Q, K, dtype=torch.bool)}, "attention_mask must have shape"),
        ({"scale": 1.0, "scaling": 1.0}, "scale and scaling"),
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"implementation": "eager"}, "eager"),
    ],
)
def test_bad_arguments_are_named(inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        attend(inputs, kwargs.pop("mask", None), **kwargs)


def test_a_window_needs_scores(inputs):
    with pytest.raises(ValueError, match="attention_bias must be given"):
        flash_dynamic_mask_attention_forward(None, *inputs[:3], None, None, keep_window_size=WINDOW)
