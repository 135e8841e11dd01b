"""Every feature, and every pair of features, against float64: outputs, lse, probabilities and all gradients.

The error may be twice that of plain torch in the same dtype, plus a rounding: plain torch is exact by luck where few
terms meet (one key, one head dimension), and there nothing can promise better than one rounding of every term to the
dtype (their errors are independent) and of their sum in float32, in which sums are accumulated.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import covering
import flash_dmattn
import reference
from devices import CUDA_DTYPES, DEVICES, on_gpu, usual_dtype
from devices import generator as make_generator

DYNAMIC_MASKS = ("dynamic", "dynamic_padded", "dynamic_everywhere")  # the last is not causal, whatever the call is
WINDOW_MASKS = ("keep", "keep_per_key", "keep_dense")  # keep_window_size=, without and with a mask beside it
TENSOR_MASKS = ("per_key", "expanded", "dense", "per_query", "keep_per_key", "keep_dense")

# A detail is None where there is nothing that it could say something about (see fits).
FACTORS = {
    "mask": (None, "per_key", "expanded", "dense", "per_query", *DYNAMIC_MASKS, *WINDOW_MASKS),
    "bias": (None, "per_key", "expanded", "full", "per_query", "single"),
    "window": (None, "one", "few", "half", "all", "more"),
    "mask_heads": (None, "one", "kv", "query"),
    "mask_batch": (None, "one", "all"),
    "mask_dtype": (None, torch.bool, torch.float32, torch.uint8),
    "bias_heads": (None, "one", "kv", "query"),
    "bias_batch": (None, "one", "all"),
    "bias_dtype": (None, "query's", "float32"),
    "bias_inf": (None, False, True),
    "lengths": (
        *((1, 1), (1, 65), (1, 1300), (2, 2), (3, 64), (63, 63), (65, 65), (64, 257), (257, 257)),
        *((65, 600), (600, 600), (64, 1), (129, 63), (600, 65)),
    ),
    "head_dim": (1, 7, 16, 33, 64, 80, 96, 127, 128, 160, 255, 256),
    "heads": ((1, 1), (2, 2), (4, 2), (3, 1), (6, 2), (8, 1)),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "is_causal": (False, True),
    "layout": ("contiguous", "heads_first", "sliced", "every_other", "expanded_batch", "expanded_heads"),
    "softcap": (None, 1.5),
    "scale": (None, 0.3),
    "grad_lse": (False, True),
    "deterministic": (None, True),
}


def fits(case):
    """Whether a case, or the part of one that is known, makes sense."""
    speaks_of = {
        "window": ("mask", DYNAMIC_MASKS + WINDOW_MASKS),
        "mask_heads": ("mask", DYNAMIC_MASKS + TENSOR_MASKS),
        "mask_batch": ("mask", (*TENSOR_MASKS, "dynamic_padded")),
        "mask_dtype": ("mask", TENSOR_MASKS),
        **dict.fromkeys(("bias_heads", "bias_batch", "bias_dtype", "bias_inf"), ("bias", FACTORS["bias"][1:])),
    }
    for detail, (feature, levels) in speaks_of.items():
        if detail in case and feature in case and (case[detail] is not None) != (case[feature] in levels):
            return False
    return not (case.get("mask") in WINDOW_MASKS and case.get("bias", "some") is None)


CASES = covering.covering_array(FACTORS, fits)
CUDA_CASES = covering.covering_array({**FACTORS, "dtype": CUDA_DTYPES}, fits) if "cuda" in DEVICES else []


def test_cases_hold_every_pair():
    covered = set().union(*map(covering.pairs, CASES))
    left = [pair for pair in covering.all_pairs(FACTORS) if pair not in covered]
    assert not [pair for pair in left if covering.complete(dict(pair), FACTORS, fits)]
    # What is left is a feature and a detail that it has not.
    assert {name for pair in left for name, _ in pair} <= set(itertools.takewhile(lambda n: n != "lengths", FACTORS))


def test_reference_agrees_with_torch(device):
    generator = make_generator(0)
    query = torch.randn(2, 30, 6, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 40, 2, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 6, 30, 40, generator=generator, dtype=torch.float64)
    visible = reference.causal_mask(30, 40)[None, None] & (torch.rand(2, 1, 1, 40, generator=generator) < 0.8)
    visible[..., 0] = True  # a row without keys is not torch's zero
    out, lse, probs = reference.attention(query, key, value, bias, visible)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    mask = bias.masked_fill(~visible, -math.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    logits = reference.logits(query, key, bias, visible, 8**-0.5, None)
    torch.testing.assert_close(probs, (logits - lse[..., None]).exp())


class Inputs:
    """The tensors of a case, made from its seed: leaves that gradients are asked of, and views of them as arguments."""

    def __init__(self, case, seed):
        self.case = case
        self.generator = make_generator(seed)
        self.dtype = case["dtype"]
        self.query_len, self.key_len = case["lengths"]
        self.heads, self.kv_heads = case["heads"]
        self.batch = 1 + self.random_int(2 if self.heads * self.query_len * self.key_len < 500_000 else 1)
        few = 2 + self.random_int(6)
        windows = {"one": 1, "few": few, "half": self.key_len // 2 + 1, "all": self.key_len, "more": self.key_len + few}
        self.window = windows.get(case["window"])
        self.leaves = {
            "query": self.leaf(self.query_len, self.heads),
            "key": self.leaf(self.key_len, self.kv_heads),
            "value": self.leaf(self.key_len, self.kv_heads),
        }
        if case["bias"] is not None:
            self.leaves["bias"] = self.bias_leaf()
        self.mask = self.tensor_mask() if case["mask"] in TENSOR_MASKS else None
        self.score = self.padding = None
        if case["mask"] in DYNAMIC_MASKS:
            score = self.random(self.batch, self.mask_heads(), self.key_len)
            self.score = (score * 3).round().to(self.dtype) / 3  # ties are the normal case
            if case["mask"] == "dynamic_padded":
                self.padding = torch.rand(self.mask_batch(), self.key_len, generator=self.generator) < 0.7
        self.grad_out = self.random(self.batch, self.query_len, self.heads, case["head_dim"]).to(self.dtype)
        self.grad_lse = self.random(self.batch, self.heads, self.query_len).to(self.lse_dtype)

    @property
    def lse_dtype(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def random(self, *size):
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def random_int(self, high):
        return int(torch.randint(high, (), generator=self.generator))

    def heads_of(self, name):
        return {"one": 1, "kv": self.kv_heads, "query": self.heads}[name]

    def mask_heads(self):
        return self.heads_of(self.case["mask_heads"])

    def mask_batch(self):
        return self.batch if self.case["mask_batch"] == "all" else 1

    def leaf(self, length, heads):
        batch, head_dim = self.batch, self.case["head_dim"]
        size = {
            "contiguous": (batch, length, heads, head_dim),
            "heads_first": (batch, heads, length, head_dim),
            "sliced": (batch, length + 1, heads, head_dim + 3),
            "every_other": (batch, 2 * length, heads, head_dim),
            "expanded_batch": (1, length, heads, head_dim),
            "expanded_heads": (batch, length, 1, head_dim),
        }[self.case["layout"]]
        return self.random(*size).to(self.dtype)

    def view(self, leaf, length, heads):
        size = self.batch, length, heads, self.case["head_dim"]
        return {
            "contiguous": lambda: leaf,
            "heads_first": lambda: leaf.transpose(1, 2),
            "sliced": lambda: leaf[:, 1:, :, 1:-2],
            "every_other": lambda: leaf[:, 1::2],
            "expanded_batch": lambda: leaf.expand(size),
            "expanded_heads": lambda: leaf.expand(size),
        }[self.case["layout"]]()

    def bias_leaf(self):
        rows = self.query_len if self.case["bias"] in ("full", "per_query") else 1
        columns = 1 if self.case["bias"] in ("per_query", "single") else self.key_len
        batch = self.batch if self.case["bias_batch"] == "all" else 1
        bias = (self.random(batch, self.heads_of(self.case["bias_heads"]), rows, columns) * 4).round() / 4
        if self.case["bias_inf"]:
            bias[torch.rand(bias.shape, generator=self.generator) < 0.2] = -math.inf
        return bias.to(self.dtype if self.case["bias_dtype"] == "query's" else torch.float32)

    def tensor_mask(self):
        kind = self.case["mask"].removeprefix("keep_")
        rows = self.query_len if kind in ("dense", "per_query") else 1
        columns = 1 if kind == "per_query" else self.key_len
        size = self.mask_batch(), self.mask_heads(), rows, columns
        mask = torch.rand(size, generator=self.generator) < 0.7
        if kind == "dense":  # blocks that are all visible, all masked, or mixed
            block = 1 + self.random_int(96)
            blocks = torch.randint(3, (*size[:2], rows // block + 1, columns // block + 1), generator=self.generator)
            blocks = blocks.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., :rows, :columns]
            mask = (mask & (blocks > 0)) | (blocks > 1)
        mask = mask.to(self.case["mask_dtype"])
        return mask.expand(-1, -1, self.query_len, -1) if kind == "expanded" else mask

    def arguments(self, leaves):
        """query, key, value and bias, as views of the leaves."""
        bias = leaves.get("bias")
        if self.case["bias"] == "expanded":
            bias = bias.expand(-1, -1, self.query_len, -1)
        return (
            self.view(leaves["query"], self.query_len, self.heads),
            self.view(leaves["key"], self.key_len, self.kv_heads),
            self.view(leaves["value"], self.key_len, self.kv_heads),
            bias,
        )

    def leaves_as(self, dtype=None):
        return {name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in self.leaves.items()}

    def visible(self):
        """(B, H, Q, K) bool, by the definitions."""
        size = self.batch, self.heads, self.query_len, self.key_len
        visible = torch.ones(size, dtype=torch.bool)
        if self.mask is not None:
            visible = visible & (reference.expand_heads(self.mask, self.heads) != 0)
        if self.case["is_causal"] or self.case["mask"] in ("dynamic", "dynamic_padded"):
            visible = visible & reference.causal_mask(self.query_len, self.key_len)
        if self.score is not None:
            selects_causally = self.case["mask"] != "dynamic_everywhere"
            mask = reference.dynamic_mask(self.score, self.window, self.query_len, selects_causally, self.padding)
            visible = visible & reference.expand_heads(mask, self.heads)
        if self.case["mask"] in WINDOW_MASKS:
            bias = reference.expand_heads(self.leaves["bias"], self.heads)
            visible = reference.select_rows(bias.expand(size), visible, self.window)
        return visible

    def flash_dmattn(self, attention=flash_dmattn.flash_dmattn_func):
        """out, lse, probs and the leaves' gradients, by the library."""
        leaves = self.leaves_as()
        query, key, value, bias = self.arguments(leaves)
        mask = self.mask
        if self.score is not None:
            mask = flash_dmattn.DynamicMask.from_score(
                self.score,
                self.window,
                is_causal=self.case["mask"] != "dynamic_everywhere",
                query_len=self.query_len,
                key_padding_mask=self.padding,
            )
        out, lse, probs = attention(
            query,
            key,
            value,
            attn_mask=mask,
            attn_bias=bias,
            scale=self.case["scale"],
            is_causal=self.case["is_causal"],
            softcap=self.case["softcap"],
            deterministic=self.case["deterministic"],
            return_attn_probs=True,
            keep_window_size=self.window if self.case["mask"] in WINDOW_MASKS else None,
        )
        assert out.dtype == probs.dtype == self.dtype and lse.dtype == self.lse_dtype
        return {"out": out.detach(), "lse": lse.detach(), "probs": probs.detach(), **self.gradients(out, lse, leaves)}

    def reference(self, visible, dtype=None):
        """The same in plain torch: in its own dtypes, or as if all of them were `dtype`."""
        leaves = self.leaves_as(dtype)
        query, key, value, bias = self.arguments(leaves)
        out, lse, probs = reference.attention(
            query, key, value, bias, visible, self.case["scale"], self.case["softcap"]
        )
        return {"out": out.detach(), "lse": lse.detach(), "probs": probs.detach(), **self.gradients(out, lse, leaves)}

    def gradients(self, out, lse, leaves):
        outputs, grads = [out], [self.grad_out.to(out.dtype)]
        if self.case["grad_lse"]:
            outputs, grads = [out, lse], [*grads, self.grad_lse.to(lse.dtype)]
        return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True))

    def magnitudes(self, exact, power):
        """For every result the magnitude of the terms that are summed to make it, (sum of |term|^power)^(1/power),
        where it is largest."""
        leaves = self.leaves_as(torch.float64)
        query, key, value, bias = self.arguments(leaves)
        group = self.heads // self.kv_heads
        out, grad_out, lse = exact["out"], self.grad_out.double(), exact["lse"]
        scale = self.case["scale"] or self.case["head_dim"] ** -0.5

        def total(equation, x, y):
            return torch.einsum(equation, x.detach().abs() ** power, y.detach().abs() ** power)

        def to_kv_heads(x):
            return x.unflatten(2, (self.kv_heads, group)).sum(3)

        wide_key, wide_value = (x.repeat_interleave(group, dim=2) for x in (key, value))
        logits = scale**power * total("bqhd,bkhd->bhqk", query, wide_key) + (self.case["softcap"] or 0) ** power
        if bias is not None:
            wide_bias = reference.expand_heads(bias, self.heads).expand_as(logits)
            logits += wide_bias.detach().nan_to_num(neginf=0).abs() ** power
        logits = logits ** (1 / power)
        probs = exact["probs"] * (1 + logits)  # a logit's error is a relative error of its probability
        grad_probs = total("bqhd,bkhd->bhqk", grad_out, wide_value)
        grad_probs += total("bqhd,bqhd->bhq", grad_out, out)[..., None]
        if self.case["grad_lse"]:
            grad_probs += self.grad_lse.double().abs()[..., None] ** power
        grad_logits = probs * grad_probs ** (1 / power)
        gradients = [
            scale**power * total("bhqk,bkhd->bqhd", grad_logits, wide_key),
            scale**power * to_kv_heads(total("bhqk,bqhd->bkhd", grad_logits, query)),
            to_kv_heads(total("bhqk,bqhd->bkhd", probs, grad_out)),
        ]
        arguments = [query, key, value]
        if bias is not None:
            arguments.append(wide_bias)
            gradients.append(grad_logits**power)
        result = {
            "out": total("bhqk,bkhd->bqhd", probs, wide_value),
            "lse": (logits.amax() + lse.nan_to_num(neginf=0).abs().amax() + 1) ** power,
            "probs": probs**power,
            # A view's gradient is a sum too: over the places that read the same element.
            **dict(zip(leaves, torch.autograd.grad(arguments, list(leaves.values()), gradients), strict=True)),
        }
        return {name: float(x.amax()) ** (1 / power) for name, x in result.items()}


def largest_error(x, exact):
    x = x.double()
    assert not x.isnan().any()
    equal = x == exact  # infinities
    return float((x - exact).masked_fill(equal, 0).abs().max())


def check(case, seed, attention=flash_dmattn.flash_dmattn_func):
    inputs = Inputs(case, seed)
    visible = inputs.visible()
    exact = inputs.reference(visible, torch.float64)
    plain = inputs.reference(visible)
    if inputs.dtype != torch.float64:  # lse is float32, and held to what float32 can do
        plain["lse"] = inputs.reference(visible, torch.float32)["lse"]
    independent, accumulated = inputs.magnitudes(exact, power=2), inputs.magnitudes(exact, power=1)
    actual = inputs.flash_dmattn(attention)
    assert actual.keys() == exact.keys()
    for name, x in actual.items():
        assert x.shape == exact[name].shape
        dtype = inputs.lse_dtype if name == "lse" else inputs.dtype
        rounding = torch.finfo(dtype).eps * independent[name] + torch.finfo(inputs.lse_dtype).eps * accumulated[name]
        if dtype == torch.float64:
            rounding *= 4  # nothing is above float64: the reference errs as well
        if name == "lse" and (inputs.dtype == torch.bfloat16 or on_gpu()):
            rounding += 2**-18  # for the few bits of these dtypes exponentials may be this wrong
        allowed = 2 * largest_error(plain[name], exact[name]) + rounding
        error = largest_error(x, exact[name])
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def label(case):
    return "-".join(str(level).removeprefix("torch.").replace(" ", "") for level in case.values())


@pytest.mark.parametrize(
    "device, case",
    [
        *(pytest.param("cpu", case, id=label(case)) for case in CASES),
        *(pytest.param("cuda", case, id=f"cuda-{label(case)}") for case in CUDA_CASES),
    ],
    indirect=["device"],
)
def test_pairs(device, case):
    check(case, seed=(CUDA_CASES if on_gpu() else CASES).index(case))


def test_heads_whose_masks_differ(device):
    """All visible, mixed, all masked, one key: what is planned for one head does not do for another."""
    query_len, key_len, heads = 300, 280, 4
    generator = make_generator(0)
    dtype, tolerance = usual_dtype(), 1e-2 if on_gpu() else 1e-5
    query = torch.randn(1, query_len, heads, 32, generator=generator).to(dtype)
    key, value = torch.randn(2, 1, key_len, heads, 32, generator=generator).to(dtype)
    kinds = torch.ones(4, query_len, key_len, dtype=torch.bool)
    kinds[1] = torch.rand(query_len, key_len, generator=generator) < 0.5
    kinds[2:] = False
    kinds[3, :, 100] = True
    for order in itertools.permutations(range(4)):
        mask = kinds[list(order)][None]
        out = flash_dmattn.flash_dmattn_func(query, key, value, mask)
        expected = reference.attention(query.double(), key.double(), value.double(), visible=mask)[0]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


SMALL_CASES = [i for i, case in enumerate(CASES) if math.prod(case["lengths"]) * case["heads"][0] <= 70_000]
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
PROGRAM = """
import torch, test_attention
print(torch.ops.flash_dmattn.cpu_instruction_set(), flush=True)
if torch.ops.flash_dmattn.cpu_instruction_set() == {name!r}:
    for i in test_attention.SMALL_CASES[{first}::{step}]:
        test_attention.check(test_attention.CASES[i], seed=i)
"""


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name):
    program = PROGRAM.format(name=name, first=INSTRUCTION_SETS.index(name), step=len(INSTRUCTION_SETS))
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={**os.environ, "FLASH_DMATTN_CPU": name},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != name:
        pytest.skip(f"this machine runs {result.stdout.strip()}")


LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 96, 97, 127, 128, 129, 255, 256, 257, 300)))


@st.composite
def cases(draw):
    case = {}
    # Each head dim is a kernel to compile: a GPU sees few of them here.
    few = {"dtype": CUDA_DTYPES, "head_dim": (24, 64, 128), "softcap": (None,)} if on_gpu() else {}
    for name, levels in {**FACTORS, **few}.items():
        if name == "lengths":
            case[name] = draw(LENGTHS), draw(LENGTHS)
        elif name == "head_dim" and not on_gpu():
            case[name] = draw(st.integers(1, 256))
        else:
            case[name] = draw(st.sampled_from([level for level in levels if fits({**case, name: level})]))
    return case


@hypothesis.settings(max_examples=3 * hypothesis.settings().max_examples)
@hypothesis.given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_any_combination(device, case, seed):
    check(case, seed)
