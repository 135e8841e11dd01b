"""The operators in PyTorch: opcheck, torch.compile, gradcheck, checkpointing, autocast, strides, memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import reference
from devices import generator as make_generator
from devices import on_gpu, usual_dtype
from flash_dmattn import DynamicMask, flash_dmattn_func, flash_dmattn_func_auto

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.flash_dmattn
B, Q, K, H, HK, D = 2, 7, 11, 4, 2, 8


def random_inputs(*, dtype=None, grad=False, batch=B, query_len=Q, key_len=K, head_dim=D):
    torch.manual_seed(0)
    dtype = dtype or usual_dtype()
    sizes = (batch, query_len, H, head_dim), (batch, key_len, HK, head_dim), (batch, key_len, HK, head_dim)
    return [torch.randn(size, dtype=dtype, requires_grad=grad) for size in sizes]


def gradients(function, *inputs):
    """out and the gradients of inputs under a fixed gradient of out."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    out.backward(torch.randn(out.shape, generator=make_generator(1)).to(out.dtype))
    return out, *(tensor.grad for tensor in inputs)


# Attention of (query, key, value, score (B, HK, K)) in the ways that take different paths.


def causal(query, key, value, score):
    return flash_dmattn_func(
        query, key, value, attn_bias=score[:, :, None], is_causal=True, softcap=3.0, deterministic=True
    )


def expanded_bias(query, key, value, score):
    bias = score[:, :, None].expand(-1, -1, query.size(1), -1)
    return flash_dmattn_func(query, key, value, attn_bias=bias, scale=0.3, deterministic=True)


def dense(query, key, value, score):
    query_len, key_len = query.size(1), key.size(1)
    position = torch.arange(query_len, device=query.device)[:, None] * torch.arange(key_len, device=query.device)
    bias = score[:, :, None] * torch.cos(position)
    return flash_dmattn_func(query, key, value, (position % 3 != 1)[None, None], bias, deterministic=True)


def dynamic(query, key, value, score):
    mask = DynamicMask.from_score(score, 4, query_len=query.size(1))
    return flash_dmattn_func(query, key, value, mask, score[:, :, None], deterministic=True)


def window(query, key, value, score):
    bias = score[:, :, None].expand(-1, -1, query.size(1), -1)
    padding = torch.arange(key.size(1), device=query.device) % 5 != 2
    padding = padding[None, None, None].expand(query.size(0), 1, query.size(1), -1)
    return flash_dmattn_func(query, key, value, padding, bias, is_causal=True, keep_window_size=4, deterministic=True)


def window_of_rows(query, key, value, score):
    bias = score[:, :, None] * torch.cos(torch.arange(query.size(1), device=query.device))[:, None]
    return flash_dmattn_func(query, key, value, attn_bias=bias, is_causal=True, keep_window_size=4, deterministic=True)


def lse(query, key, value, score):
    out, lse, _ = flash_dmattn_func_auto()(
        query, key, value, attn_bias=score[:, :, None], is_causal=True, deterministic=True, return_attn_probs=True
    )
    return out + lse.transpose(1, 2)[..., None].to(out.dtype)


def lse_alone(query, key, value, score):
    return flash_dmattn_func(
        query, key, value, attn_bias=score[:, :, None], deterministic=True, return_attn_probs=True
    )[1]


KINDS = (causal, expanded_bias, dense, dynamic, window, window_of_rows, lse, lse_alone)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("features", ("none", "all", "float32 bias"))
def test_opcheck_attention(features, grad, dtype):
    inputs = random_inputs(dtype=dtype, grad=grad)
    mask = bias = end = survivors = None
    if features != "none":
        mask = torch.rand(1, 1, Q, K) > 0.2
        bias = torch.randn(B, HK, 1, K, dtype=dtype if features == "all" else torch.float32, requires_grad=grad)
        dynamic = DynamicMask.from_score(torch.randn(B, 1, K), 5, query_len=Q)
        end, survivors = dynamic.end, dynamic.survivors
    options = (mask, bias, end, survivors, 0.3, 2.0 if features == "all" else 0.0, True)
    torch.library.opcheck(ops.forward, (*inputs, *options, True))

    out, lse = (tensor.detach() for tensor in ops.forward(*inputs, *options, True))
    inputs = [tensor.detach() for tensor in inputs]
    options = (mask, None if bias is None else bias.detach(), *options[2:])
    for grad_lse in (None, torch.randn_like(lse)):
        saved = *inputs, out, lse, None
        arguments = (torch.randn_like(out), grad_lse, *saved, *options, True, grad and bias is not None)
        torch.library.opcheck(ops.backward, arguments)
    torch.library.opcheck(ops.probabilities, (*inputs[:2], lse, *options))


@pytest.mark.parametrize("kind", ("dense", "of heads", "expanded", "per key"))
def test_opcheck_saving(kind):
    inputs = random_inputs(query_len=70)
    size = {"dense": (B, 1, 70, K), "of heads": (1, H, 70, K), "expanded": (1, HK, 70, K), "per key": (B, 1, 1, K)}[
        kind
    ]
    mask = torch.rand(size) > 0.2
    visible = mask.expand(B, -1, -1, -1) if kind == "expanded" else mask
    options = visible, None, None, None, 0.3, 0.0, False  # of a causal problem, some bits may be anything
    torch.library.opcheck(ops.forward_saving, (*inputs, *options, True))

    out, lse, mask_bits = ops.forward_saving(*inputs, *options, True)
    torch.testing.assert_close((out, lse), ops.forward(*inputs, *options, True))
    if on_gpu() and kind != "per key":
        words = torch.nn.functional.pad(mask, (0, 0, 0, 96 - 70)).unflatten(2, (3, 32)).long()
        words = (words << torch.arange(32)[:, None]).sum(3).to(torch.int32)
        assert torch.equal(mask_bits, words)
    else:
        assert mask_bits.numel() == 0
    arguments = (torch.randn_like(out), None, *inputs, out, lse)
    torch.library.opcheck(ops.backward, (*arguments, mask_bits, *options, True, False))
    got, expected = (ops.backward(*arguments, bits, *options, True, False) for bits in (mask_bits, None))
    assert all(torch.equal(*both) for both in zip(got, expected, strict=True))


def test_opcheck_masks():
    score = torch.randn(B, HK, K)
    for padding in (None, torch.rand(1, K) > 0.3):
        torch.library.opcheck(ops.dynamic_mask, (score, padding, 3, Q, True))
    rows = score[:, :, None].expand(-1, -1, Q, -1)
    for visible in (None, torch.rand(B, HK, Q, K) > 0.3):
        torch.library.opcheck(ops.select_keys, (rows, visible, 3, True))


@pytest.mark.cpu  # in float64
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    inputs = random_inputs(dtype=torch.float64, grad=True, query_len=4, key_len=6, head_dim=3)
    score = torch.randn(B, HK, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kind, (*inputs, score))


@pytest.mark.parametrize("kind", (causal, dense))
def test_gradients_asked_for_twice(kind):
    inputs = [*random_inputs(grad=True), torch.randn(B, HK, K, requires_grad=True)]
    out = kind(*inputs).sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    assert all(torch.equal(*both) for both in zip(torch.autograd.grad(out, inputs), first, strict=True))


@pytest.mark.parametrize("masked", (False, True))
def test_double_backward_is_refused(masked):
    inputs = random_inputs(grad=True)
    mask = torch.rand(1, 1, Q, K) > 0.2 if masked else None
    grad_query, *_ = torch.autograd.grad(flash_dmattn_func(*inputs, mask).sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="flash_dmattn has no double backward"):
        grad_query.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_compile_traces_everything(kind):
    torch.compiler.reset()
    compiled = torch.compile(kind, fullgraph=True, backend="aot_eager")
    for query_len, key_len in ((7, 11), (9, 9), (6, 20)):  # compiled for one size, then for any
        inputs = random_inputs(grad=True, query_len=query_len, key_len=key_len)
        score = torch.randn(B, HK, key_len, requires_grad=True)
        torch.testing.assert_close(gradients(compiled, *inputs, score), gradients(kind, *inputs, score))


@pytest.mark.parametrize("kind", (expanded_bias, dense, window))
def test_compile_with_the_default_compiler(kind):
    torch.compiler.reset()
    inputs = [*random_inputs(grad=True), torch.randn(B, HK, K, requires_grad=True)]
    compiled = torch.compile(kind, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, *inputs), gradients(kind, *inputs))


def test_compile_with_a_mask_and_options_from_outside():
    torch.compiler.reset()
    inputs = random_inputs()
    compiled = torch.compile(flash_dmattn_func, fullgraph=True, backend="aot_eager")
    for window_size, scale in ((3, None), (4, 0.2), (5, 0.3), (5, 0.4)):
        mask = DynamicMask.from_score(torch.randn(B, HK, K), window_size, query_len=Q)
        expected = flash_dmattn_func(*inputs, mask, scale=scale)
        torch.testing.assert_close(compiled(*inputs, mask, scale=scale), expected)


def test_compile_raises_no_error_of_its_own_for_unchecked_nan(monkeypatch):
    monkeypatch.setenv("FLASH_DMATTN_CHECK", "1")
    torch.compiler.reset()
    inputs = random_inputs()
    score = torch.randn(B, HK, K)
    compiled = torch.compile(dynamic, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, score), dynamic(*inputs, score))


@pytest.mark.parametrize("kind", (causal, dense, dynamic, lse))
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing(kind, use_reentrant):
    inputs = [*random_inputs(grad=True), torch.randn(B, HK, K, requires_grad=True)]

    def checkpointed(*inputs):
        # Inside a computation, as in a model.
        return checkpoint(kind, *(tensor * 1 for tensor in inputs), use_reentrant=use_reentrant)

    for got, expected in zip(gradients(checkpointed, *inputs), gradients(kind, *inputs), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("autocast_dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("compiled", (False, True))
def test_autocast(autocast_dtype, compiled, device):
    torch.compiler.reset()
    inputs = [*random_inputs(dtype=torch.float32, grad=True), torch.randn(B, HK, K, requires_grad=True)]
    inputs[1] = inputs[1].detach().bfloat16().requires_grad_()  # as where a layer's output meets a normalised one
    function = torch.compile(causal, fullgraph=True, backend="aot_eager") if compiled else causal
    with torch.autocast(device, dtype=autocast_dtype):
        out, *grads = gradients(function, *inputs)

    def cast(query, key, value, score):
        return causal(*(tensor.to(autocast_dtype) for tensor in (query, key, value)), score)

    assert out.dtype == autocast_dtype
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in inputs]
    for got, expected in zip((out, *grads), gradients(cast, *inputs), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.cpu  # in float64
def test_autocast_leaves_float64_and_what_is_outside_alone():
    inputs = random_inputs(dtype=torch.float64)
    with torch.autocast("cpu"):
        assert flash_dmattn_func(*inputs).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert flash_dmattn_func(*random_inputs()).dtype == torch.float32


class Record(TorchDispatchMode):
    """The operators that run, and the largest tensor that any of them makes."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        inputs = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("size", ((1, 1, Q, K), (1, 1, 1, K), (1, 1, Q, 1)))
def test_bits_are_saved_of_masks_with_a_value_for_each_pair(size):
    inputs = random_inputs(grad=True)
    with Record() as record:
        out = flash_dmattn_func(*inputs, torch.rand(size) > 0.2)
        torch.autograd.grad(out.sum(), inputs)
    saves = on_gpu() and size == (1, 1, Q, K)
    assert ("flash_dmattn::forward_saving" in record.names) == saves
    assert ("flash_dmattn::forward" in record.names) != saves


def heads_first(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def packed(tensor):
    """A slice of a larger tensor, as of one projection for query, key and value."""
    return torch.cat([torch.full_like(tensor, torch.nan), tensor, torch.full_like(tensor, torch.nan)], dim=2)[
        :, :, tensor.size(2) : 2 * tensor.size(2)
    ]


def sliced(tensor):
    """Every second position of a longer sequence, and some of a wider last dimension."""
    longer = torch.full((tensor.size(0), 2 * tensor.size(1) + 1, tensor.size(2), tensor.size(3) + 5), torch.nan)
    longer = longer.to(tensor.dtype)
    longer[:, 1::2, :, 3:-2] = tensor
    return longer[:, 1::2, :, 3:-2]


def expanded(tensor):
    return tensor[:1, :, :1].expand(tensor.shape)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", (heads_first, packed, sliced, expanded))
def test_strided_inputs_are_read_in_place(layout, dtype):
    inputs = [layout(tensor) for tensor in random_inputs(dtype=dtype)]
    mask = (torch.rand(B, Q, K, 1) > 0.3).permute(0, 3, 1, 2)
    bias = torch.randn(B, 2 * K, HK).to(dtype)[:, ::2].transpose(1, 2)[:, :, None]
    with Record() as record:
        out = flash_dmattn_func(*inputs, mask, bias, is_causal=True)
    assert [name for name in record.names if name not in ("aten::detach", "aten::alias")] == ["flash_dmattn::forward"]
    copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (*inputs, mask, bias)]
    assert torch.equal(out, flash_dmattn_func(*copies, is_causal=True))


@pytest.mark.parametrize("layout", (heads_first, packed, sliced, expanded))
def test_gradients_of_strided_inputs(layout):
    def function(query, key, value, score):
        out = dynamic(layout(query), layout(key), layout(value), score)
        return layout(out)  # so that the gradient of out is strided too

    def contiguous(query, key, value, score):
        return layout(dynamic(*(layout(tensor).contiguous() for tensor in (query, key, value)), score)).contiguous()

    inputs = [*random_inputs(grad=True), torch.randn(B, HK, K, requires_grad=True)]
    torch.testing.assert_close(gradients(function, *inputs), gradients(contiguous, *inputs))


@pytest.mark.parametrize("compiled", (False, True))
def test_an_expanded_gradient_of_out(compiled):
    torch.compiler.reset()
    function = torch.compile(causal, fullgraph=True, backend="aot_eager") if compiled else causal
    inputs = [*random_inputs(grad=True), torch.randn(B, HK, K, requires_grad=True)]
    got = torch.autograd.grad(function(*inputs).sum(), inputs)
    out = causal(*inputs)
    torch.testing.assert_close(got, torch.autograd.grad(out, inputs, torch.ones_like(out)))


def test_frozen_tensors_are_read_and_left_alone():
    inputs = random_inputs()
    copies = [tensor.clone() for tensor in inputs]
    with torch.inference_mode():
        out = flash_dmattn_func(*inputs, is_causal=True)
    assert torch.equal(out, flash_dmattn_func(*inputs, is_causal=True))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


@pytest.mark.cpu  # in float64
@pytest.mark.parametrize("shape", [(b, h, q, k) for b in (1, B) for h in (1, HK, H) for q in (1, Q) for k in (1, K)])
def test_bias_gradients_have_the_shape_of_the_bias(shape):
    inputs = random_inputs(dtype=torch.float64)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    visible = reference.causal_mask(Q, K)[None, None]
    grad = torch.randn(B, Q, H, D, dtype=torch.float64)
    got = torch.autograd.grad(flash_dmattn_func(*inputs, attn_bias=bias, is_causal=True), bias, grad)[0]
    expected = torch.autograd.grad(reference.attention(*inputs, bias=bias, visible=visible)[0], bias, grad)[0]
    assert got.shape == shape
    torch.testing.assert_close(got, expected)


LONG = 512  # LONG * LONG is larger than every input


@pytest.mark.parametrize("kind", (causal, expanded_bias, dynamic, window))
def test_no_tensor_of_queries_times_keys(kind):
    inputs = random_inputs(grad=True, batch=1, query_len=LONG, key_len=LONG)
    score = torch.randn(1, HK, LONG, requires_grad=True)
    with Record() as record:
        gradients(kind, *inputs, score)
    assert {"flash_dmattn::forward", "flash_dmattn::backward"} <= set(record.names)
    assert record.largest <= LONG * H * D


EXPANSIONS = {
    "queries": lambda x: x[:, :, None].expand(-1, -1, Q, -1),
    "batch and queries": lambda x: x[0, :, None].expand(B, -1, Q, -1),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, None].expand(-1, -1, Q, -1),
    "slice of more": lambda x: torch.cat([x, x], -1)[:, :, 3 : 3 + K].unsqueeze(2).expand(-1, -1, Q, -1),
    "every head": lambda x: x[:, :1, None].expand(-1, H, Q, -1),
    "computed": lambda x: torch.exp(x)[:, :, None].expand(-1, -1, Q, -1),
    "detached in part": lambda x: (x + x.detach())[:, :, None].expand(-1, -1, Q, -1),
}


@pytest.mark.cpu  # in float64
@pytest.mark.parametrize("expand", EXPANSIONS.values(), ids=EXPANSIONS)
def test_gradients_of_expanded_biases(expand):
    inputs = random_inputs(dtype=torch.float64)
    score = torch.randn(B, HK, K, dtype=torch.float64, requires_grad=True)

    def attend(contiguous):
        bias = expand(score)
        return flash_dmattn_func(*inputs, attn_bias=bias.contiguous() if contiguous else bias, is_causal=True)

    (got,), (expected,) = (
        torch.autograd.grad(attend(contiguous).square().sum(), score) for contiguous in (False, True)
    )
    torch.testing.assert_close(got, expected)


def per_element_gradient(score, inputs):
    bias = score[:, :, None].expand(-1, -1, Q, -1).contiguous().requires_grad_()
    return torch.autograd.grad(flash_dmattn_func(*inputs, attn_bias=bias).square().sum(), bias)[0]


def test_an_expanded_bias_whose_own_gradient_is_asked_for_gets_it():
    inputs = random_inputs()
    score = torch.randn(B, HK, K, requires_grad=True)
    expected = per_element_gradient(score.detach(), inputs)

    leaf = score.detach()[:, :, None].expand(-1, -1, Q, -1).requires_grad_()
    flash_dmattn_func(*inputs, attn_bias=leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected)

    retained = score[:, :, None].expand(-1, -1, Q, -1)
    retained.retain_grad()
    flash_dmattn_func(*inputs, attn_bias=retained).square().sum().backward()
    torch.testing.assert_close(retained.grad, expected)
    torch.testing.assert_close(score.grad, expected.sum(2))

    hooked, seen = score[:, :, None].expand(-1, -1, Q, -1), []
    hooked.register_hook(seen.append)
    flash_dmattn_func(*inputs, attn_bias=hooked).square().sum().backward()
    torch.testing.assert_close(seen, [expected])


class TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, score):
        return score[:, :, None].expand(-1, -1, Q, -1)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad.sum(2)


def test_a_view_with_a_backward_of_its_own_keeps_it():
    inputs = random_inputs()
    score = torch.randn(B, HK, K, requires_grad=True)
    out = flash_dmattn_func(*inputs, attn_bias=TwiceTheGradient.apply(score))
    expected = 2 * per_element_gradient(score.detach(), inputs).sum(2)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), score)[0], expected)


@pytest.mark.cpu
def test_the_instruction_set_has_a_name():
    assert ops.cpu_instruction_set()


@pytest.mark.cpu
def test_threads_follow_torch():
    inputs = random_inputs()
    threads = torch.get_num_threads()
    expected = flash_dmattn_func(*inputs)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(flash_dmattn_func(*inputs), expected)
    finally:
        torch.set_num_threads(threads)
