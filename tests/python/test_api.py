"""The public names, and what they do on a machine without a GPU."""

import inspect
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flash_dmattn
import reference
from flash_dmattn import DynamicMask, backends, flash_dmattn_func, flash_dmattn_func_auto

OPTIONS = (
    *("attn_mask", "attn_bias", "scale", "is_causal", "softcap", "deterministic", "return_attn_probs"),
    "keep_window_size",
)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 9, 4, 8), torch.randn(2, 13, 2, 8), torch.randn(2, 13, 2, 8)


def test_names():
    assert set(flash_dmattn.__all__) == {
        *("get_available_backends", "flash_dmattn_func_auto", "flash_dmattn_func", "triton_dmattn_func"),
        *("flex_dmattn_func", "CUDA_AVAILABLE", "TRITON_AVAILABLE", "FLEX_AVAILABLE", "DynamicMask"),
    }
    assert all(hasattr(flash_dmattn, name) for name in flash_dmattn.__all__)


def test_signatures():
    for name, first in (("flash", "scale"), ("triton", "is_causal"), ("flex", "is_causal")):
        parameters = inspect.signature(getattr(flash_dmattn, f"{name}_dmattn_func")).parameters
        assert list(parameters)[:6] == ["query", "key", "value", "attn_mask", "attn_bias", first]
        assert set(parameters) == {"query", "key", "value", *OPTIONS}
    assert set(inspect.signature(flash_dmattn_func_auto()).parameters) == {"query", "key", "value", *OPTIONS}


def modules_after(program):
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, torch; {program}; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(loaded.stdout.split())


def test_import_is_light():
    new = modules_after("import flash_dmattn") - modules_after("pass")
    assert "flash_dmattn.api" in new
    names = {name for name in new if not name.startswith("flash_dmattn")}
    # Nothing but small modules of Python's own, and of this package neither a backend nor an integration.
    assert not {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    assert not {name for name in new if name.startswith(("flash_dmattn.backends.", "flash_dmattn.integrations"))}


def test_backends_are_loaded_when_asked_for():
    attend = "import flash_dmattn; flash_dmattn.flash_dmattn_func(*torch.randn(3, 1, 2, 2, 8))"
    new = modules_after(attend) - modules_after("pass")
    loaded = {name for name in new if name.startswith("flash_dmattn.backends.")}
    assert loaded == {"flash_dmattn.backends.cpu", "flash_dmattn.backends.self_check"}
    assert not {name for name in new if name.partition(".")[0] in ("triton", "sympy")}
    assert not {name for name in new if name.startswith(("torch._dynamo", "torch._inductor"))}


def test_available_backends_are_listed_best_first():
    flags = {
        "cuda": flash_dmattn.CUDA_AVAILABLE,
        "triton": flash_dmattn.TRITON_AVAILABLE,
        "flex": flash_dmattn.FLEX_AVAILABLE,
        "cpu": True,
    }
    assert flash_dmattn.get_available_backends() == [name for name, available in flags.items() if available]


@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_a_missing_backend_says_what_is_missing_and_what_to_use(name, inputs):
    if name in flash_dmattn.get_available_backends():
        pytest.skip(f"{name} is available")
    with pytest.raises(ImportError, match=f"the {name} backend is missing: .* use flex_dmattn_func"):
        flash_dmattn_func_auto(backend=name)
    if name == "triton":
        with pytest.raises(ImportError, match="the triton backend is missing"):
            flash_dmattn.triton_dmattn_func(*inputs)


def test_flex_without_a_compiler_is_missing(monkeypatch, inputs):
    flex = backends.load("flex")
    monkeypatch.setenv("CXX", "no-such-compiler")
    if not torch.cuda.is_available():
        assert "no C++ compiler no-such-compiler" in flex._find_missing()
    monkeypatch.setattr(flex, "MISSING", "the flex backend is missing: a reason")
    with pytest.raises(ImportError, match="a reason"):
        flash_dmattn.flex_dmattn_func(*inputs)
    assert "flex" not in flash_dmattn.get_available_backends()
    assert not flash_dmattn.FLEX_AVAILABLE


def raises(problem):
    raise RuntimeError("no kernel image\nand more")


@pytest.mark.parametrize("attention, reason", (
    (raises, r"tried on cpu, it raised RuntimeError: no kernel image$"),
    (lambda problem: problem.value[:, :2].expand(-1, -1, 2, -1), r"tried on cpu, its result differs from float64's by"),
    (lambda problem: torch.full_like(problem.query, float("nan")), r"its result differs from float64's by nan"),
))  # fmt: skip
def test_a_backend_that_does_not_work_is_missing(attention, reason, monkeypatch, inputs):
    """It is tried once, when it is first asked for."""
    cpu = backends.load("cpu")
    calls = []
    monkeypatch.setattr(backends, "_tried", {})
    monkeypatch.setattr(cpu, "attention", lambda problem: calls.append(1) or attention(problem))
    assert len(calls) == 0
    assert "cpu" not in flash_dmattn.get_available_backends()
    for ask in (lambda: flash_dmattn_func(*inputs), lambda: flash_dmattn_func_auto(backend="cpu")):
        with pytest.raises(ImportError, match="the cpu backend is missing: tried on cpu"):
            ask()
    assert len(calls) == 1
    assert re.search(reason, backends.missing("cpu"))


@pytest.mark.parametrize("has_bias", (False, True))
def test_a_try_is_like_the_call_that_it_is_for(has_bias, monkeypatch):
    """What a backend compiles for a dtype, head dim and kind of bias serves both."""
    cpu = backends.load("cpu")
    monkeypatch.setattr(backends, "_tried", {})
    tried = []
    attention = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda problem: tried.append(problem) or attention(problem))
    flash_dmattn_func(
        *torch.randn(3, 1, 5, 2, 24, dtype=torch.bfloat16), attn_bias=torch.zeros(1, 1, 1, 5) if has_bias else None
    )
    assert [(x.query.dtype, x.query.size(3), x.bias is not None) for x in tried] == 2 * [(torch.bfloat16, 24, has_bias)]


def test_a_try_leaves_nothing_behind_that_breaks_tracing():
    code = "import flash_dmattn, torch; flash_dmattn.get_available_backends()"
    code += "\nwith torch._subclasses.FakeTensorMode(): pass"
    subprocess.run([sys.executable, "-c", code], check=True)


class NoOperator(TorchDispatchMode):
    def __torch_dispatch__(self, operator, *_):
        raise AssertionError(f"{operator} has been called")


def test_modes_of_the_caller_do_not_reach_the_try(monkeypatch):
    monkeypatch.setattr(backends, "_tried", {})
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert backends.missing("cpu") is None
    monkeypatch.setattr(backends, "_tried", {})
    with NoOperator():
        assert backends.missing("cpu") is None


@pytest.mark.parametrize("backend", (None, "cpu"))
def test_auto_takes_cpu_tensors_to_the_engine(backend, inputs):
    bias = torch.randn(2, 2, 1, 13)
    out = flash_dmattn_func_auto(backend=backend)(*inputs, attn_bias=bias, is_causal=True, scale=None)
    assert torch.equal(out, flash_dmattn_func(*inputs, attn_bias=bias, is_causal=True))


def test_auto_refuses_other_names():
    with pytest.raises(
        ValueError, match="backend is 'cudnn'; it takes 'cuda', 'triton', 'flex', 'cpu' or None"
    ) as error:
        flash_dmattn_func_auto(backend="cudnn")
    lines = str(error.value).splitlines()
    assert lines == ["backend is 'cudnn'; it takes 'cuda', 'triton', 'flex', 'cpu' or None. Backends:", *lines[1:]]
    assert re.fullmatch(r"  cpu +available", lines[4])
    for name, line in zip(backends.BACKENDS, lines[1:], strict=True):
        assert re.fullmatch(rf"  {name} +(available|missing: .+)", line)


def test_positional_options_are_in_the_documented_order(inputs):
    mask, bias = torch.rand(2, 1, 9, 13) > 0.3, torch.randn(2, 4, 9, 13)
    out, _, _ = flash_dmattn_func(*inputs, mask, bias, 0.3, True, 2.0, True, True)
    named = flash_dmattn_func(*inputs, attn_mask=mask, attn_bias=bias, scale=0.3, is_causal=True, softcap=2.0)
    assert torch.equal(out, named)


def test_probabilities_come_with_out_and_lse(inputs):
    out, lse, probs = flash_dmattn_func(*(x.requires_grad_() for x in inputs), is_causal=True, return_attn_probs=True)
    assert out.shape == (2, 9, 4, 8) and out.dtype == torch.float32
    assert lse.shape == (2, 4, 9) and lse.dtype == torch.float32
    assert probs.shape == (2, 4, 9, 13) and probs.dtype == torch.float32
    assert out.requires_grad and lse.requires_grad and not probs.requires_grad
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 9))
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", probs, inputs[2].repeat_interleave(2, dim=2)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.uint8, torch.int64))
@pytest.mark.parametrize("shape", ((2, 1, 1, 13), (1, 2, 9, 13), (2, 4, 9, 1)))
def test_a_mask_of_numbers_is_a_mask(dtype, shape, inputs):
    mask = torch.rand(shape) > 0.4
    assert torch.equal(flash_dmattn_func(*inputs, mask.to(dtype)), flash_dmattn_func(*inputs, mask))


@pytest.mark.parametrize("mask_is_causal", (True, False))
@pytest.mark.parametrize("is_causal", (None, False, True))
def test_causality_of_call_and_dynamic_mask(mask_is_causal, is_causal, inputs):
    mask = DynamicMask.from_score(torch.randn(2, 2, 13), 5, is_causal=mask_is_causal, query_len=9)
    visible = mask.to_dense()
    if is_causal:
        visible = visible & reference.causal_mask(9, 13)
    out = flash_dmattn_func(*inputs, mask, is_causal=is_causal)
    torch.testing.assert_close(out, reference.attention(*inputs, visible=visible)[0])


@pytest.mark.parametrize("is_causal", (None, True))
@pytest.mark.parametrize("query_len", (1, 9))
def test_keep_window_size_is_the_dynamic_mask_of_the_bias(is_causal, query_len, inputs):
    query, key, value = inputs
    query = query[:, :query_len]
    score = torch.randn(2, 2, 13)
    bias = score[:, :, None].expand(-1, -1, query_len, -1)
    out = flash_dmattn_func(query, key, value, attn_bias=bias, is_causal=is_causal, keep_window_size=4)
    mask = DynamicMask.from_score(score, 4, is_causal=bool(is_causal), query_len=query_len)
    assert torch.equal(out, flash_dmattn_func(query, key, value, mask, attn_bias=bias))


def test_a_default_device_costs_little(inputs):
    """It is a mode of torch functions, which slows down each one that goes through it, attributes included."""
    bias = torch.randn(2, 2, 1, 13)
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            seen.append(function)
            return function(*arguments, **(options or {}))

    expected = flash_dmattn_func(*inputs, attn_bias=bias, is_causal=True, keep_window_size=4)
    with torch.no_grad(), Mode():
        out = flash_dmattn_func(*inputs, attn_bias=bias, is_causal=True, keep_window_size=4)
    assert torch.equal(out, expected)
    assert torch.ops.flash_dmattn.forward.default in seen
    assert len(seen) <= 2


@pytest.mark.parametrize("score_heads, mask_heads", ((1, 1), (2, 1), (4, 2), (2, 4), (1, 4)))
@pytest.mark.parametrize("mask_batch", (1, 2))
def test_keep_window_size_selects_among_what_a_padding_mask_leaves(score_heads, mask_heads, mask_batch, inputs):
    bias, padding = torch.randn(1, score_heads, 1, 13), torch.rand(mask_batch, mask_heads, 1, 13) > 0.4
    visible = reference.expand_heads(padding, 4) & reference.causal_mask(9, 13)
    scores = reference.expand_heads(bias, 4)[:, :, 0].expand(mask_batch, -1, -1)
    visible = reference.select(scores, visible, 4)
    expected = reference.attention(*inputs, bias=bias, visible=visible)[0]
    for mask in (padding, padding.expand(-1, -1, 9, -1)):
        out = flash_dmattn_func(*inputs, mask, bias, is_causal=True, keep_window_size=4)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("score_shape", ((2, 2, 1, 13), (1, 4, 9, 13)))
@pytest.mark.parametrize("mask_shape", (None, (2, 1, 1, 13), (1, 2, 9, 13), (2, 4, 9, 1)))
def test_keep_window_size_with_rows_of_their_own(score_shape, mask_shape, inputs):
    bias = torch.randn(score_shape)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask_shape is None else torch.rand(mask_shape) > 0.4
    visible = reference.expand_heads(mask, 4) & reference.causal_mask(9, 13)
    score, visible = torch.broadcast_tensors(reference.expand_heads(bias, 4), visible)
    visible = reference.select_rows(score, visible, 4)
    out = flash_dmattn_func(*inputs, mask if mask_shape else None, bias, is_causal=True, keep_window_size=4)
    torch.testing.assert_close(out, reference.attention(*inputs, bias=bias, visible=visible)[0])


def test_dynamic_mask_describes_itself():
    mask = DynamicMask.from_score(torch.randn(2, 3, 20), 4, query_len=6)
    assert repr(mask) == "DynamicMask(shape=(2, 3, 6, 20), keep_window_size=4, is_causal=True, device=cpu)"


@pytest.mark.parametrize("query_len, key_len", ((7, 20), (20, 7)))
def test_density_of_a_mask_that_is_not_causal(query_len, key_len):
    mask = DynamicMask.from_score(torch.randn(2, 3, key_len), 4, is_causal=False, query_len=query_len)
    assert mask.density() == pytest.approx(4 / key_len)
    assert mask.density() == pytest.approx(mask.to_dense().double().mean().item())
    assert DynamicMask.from_score(torch.randn(2, 0, 7), 4).density() == 0.0


def test_a_padding_mask_of_numbers():
    score, padding = torch.randn(2, 3, 20), torch.rand(2, 20) > 0.4
    mask = DynamicMask.from_score(score, 4, key_padding_mask=padding)
    assert torch.equal(DynamicMask.from_score(score, 4, key_padding_mask=padding.float()).end, mask.end)
