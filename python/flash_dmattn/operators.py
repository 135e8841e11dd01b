"""The library's PyTorch operators, `torch.ops.flash_dmattn.*`, with what the compiler and autograd need of them.

Their arguments are those of include/flash_dmattn/attention.h and dynamic_mask.h.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import cuda_kernels

torch.ops.load_library(Path(__file__).with_name("_C.so"))
cuda_kernels.set_up()

probabilities = torch.ops.flash_dmattn.probabilities
dynamic_mask = torch.ops.flash_dmattn.dynamic_mask
select_keys = torch.ops.flash_dmattn.select_keys
survivor_chunk = torch.ops.flash_dmattn.survivor_chunk
cpu_instruction_set = torch.ops.flash_dmattn.cpu_instruction_set


def __getattr__(name: str) -> str:
    """CUDA_MISSING: what keeps the CUDA kernels from running here, a sentence; empty if nothing does.

    Found out when first asked for, as it loads the driver, after which a process can no longer fork and use CUDA.
    """
    if name != "CUDA_MISSING":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if torch.backends.cuda.is_built():
        # One GPU that works is enough.
        devices = range(max(1, torch.cuda.device_count()))
        missing = min((torch.ops.flash_dmattn.cuda_missing(device) for device in devices), key=bool)
    else:
        missing = f"torch {torch.__version__} is built without CUDA"
    return globals().setdefault(name, missing)


@torch.library.register_fake("flash_dmattn::forward")
def fake_forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, query_len, heads, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty((batch, heads, query_len), dtype=lse_dtype)


@torch.library.register_fake("flash_dmattn::forward_saving")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    bits: tuple[Any, ...] = 0, 0, 0, 0
    if mask is not None and mask.is_cuda:
        # What an expand made of it is undone.
        batch, heads, query_len, key_len = (
            1 if stride == 0 and size > 1 else size for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )
        if query_len != 1 and key_len != 1:
            bits = batch, heads, (query_len + 31) // 32, key_len
    return *fake_forward(query), query.new_empty(bits, dtype=torch.int32)


@torch.library.register_fake("flash_dmattn::backward")
def fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, _, bias, *_, needs_bias_grad = arguments
    grad_bias = bias.new_empty(bias.shape) if needs_bias_grad else query.new_empty((0,))
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_bias


@torch.library.register_fake("flash_dmattn::probabilities")
def fake_probabilities(query: Tensor, key: Tensor, *arguments: Any) -> Tensor:
    batch, query_len, heads, _ = query.shape
    return query.new_empty((batch, heads, query_len, key.size(1)))


@torch.library.register_fake("flash_dmattn::dynamic_mask")
def _(
    score: Tensor, key_padding_mask: Tensor | None, keep_window_size: int, query_len: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, key_len = score.shape
    survivors: tuple[Any, Any] = 0, 0
    if score.is_cuda and is_causal:
        chunk = survivor_chunk(int(keep_window_size))
        survivors = (key_len + chunk - 1) // chunk, torch.sym_min(keep_window_size, key_len)
    return (
        score.new_empty(score.shape, dtype=torch.int32),
        score.new_empty((batch, heads, *survivors), dtype=torch.int32),
    )


@torch.library.register_fake("flash_dmattn::select_keys")
def _(score: Tensor, *arguments: Any) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


# torch.library.register_autograd would call Functions like these from within the dispatcher, and turn every argument
# from Python to C++ and back once more: several times the host time of the operator itself.


def with_gradients(
    forward_operator: Callable[..., Any],
    backward_operator: Callable[..., Any],
    saving_operator: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The operator forward, or one with the same arguments, with gradients by the operator backward that belongs to it.

    saving_operator: forward_saving, if there is one: for a mask with a value for each pair, on a GPU.
    The gradients themselves cannot be differentiated.
    """

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            *tensors, options = arguments
            mask, mask_bits = tensors[3], None
            if saving_operator and mask is not None and mask.is_cuda and mask.size(2) != 1 and mask.size(3) != 1:
                out, lse, mask_bits = saving_operator(*tensors, *options)
            else:
                out, lse = forward_operator(*tensors, *options)
            ctx.save_for_backward(*tensors, out, lse, mask_bits)
            ctx.options = options
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
            query, key, value, *masks, out, lse, mask_bits = ctx.saved_tensors  # mask, bias, end, survivors
            if grad_out is None:
                grad_out = torch.zeros_like(out)
            needs_bias_grad = ctx.needs_input_grad[4]
            saved = query, key, value, out, lse, mask_bits, *masks
            arguments = (grad_out, grad_lse, *saved, *ctx.options, needs_bias_grad)
            *grads, grad_bias = (Backward.apply if torch.is_grad_enabled() else backward_operator)(*arguments)
            return *grads, None, grad_bias if needs_bias_grad else None, None, None, None

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return backward_operator(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
            raise NotImplementedError(
                "flash_dmattn has no double backward: gradients of attention cannot be differentiated"
            )

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            query, key, value, _, bias = arguments[:5]
            bias_requires_grad = bias is not None and bias.requires_grad
            if query.requires_grad or key.requires_grad or value.requires_grad or bias_requires_grad:
                return Forward.apply(*arguments[:7], arguments[7:])
        return forward_operator(*arguments)

    return forward


backward = torch.ops.flash_dmattn.backward.default
forward_saving = torch.ops.flash_dmattn.forward_saving.default
forward = with_gradients(torch.ops.flash_dmattn.forward.default, backward, forward_saving)
