"""Compiles what a call of the Triton backend would launch, for a GPU that need not be there: no kernel runs."""

import contextlib
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class NoDevice:
    """As much of Triton's driver as compiling takes."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling_for(name, first_only=False):
    """Within it, calls on CPU tensors compile their kernels for a target; of those that are tuned each configuration,
    or the first.

    Gives a list, to which (kernel's name, blocks, compiled kernel) are added; compiled.asm and .metadata say more.
    """
    kernels = []
    run = triton.runtime.JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        blocks = {k: v for k, v in options.items() if k.startswith("BLOCK") or k in ("num_warps", "num_stages")}
        kernels.append((self.fn.__name__, blocks, compiled))

    def compile_all(self, *args, **options):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(options)[: 1 if first_only else None]:
            self.fn.run(*args, **options, **config.all_kwargs())

    caches = [f.device_caches for f in _functions()]
    for cache in caches:
        cache.clear()
    try:
        with (
            mock.patch.object(triton.runtime.driver, "_active", NoDevice(TARGETS[name])),
            mock.patch.object(triton.runtime.JITFunction, "run", compile_only),
            mock.patch.object(triton.runtime.autotuner.Autotuner, "run", compile_all),
        ):
            yield kernels
    finally:
        for cache in caches:
            cache.clear()


def _functions():
    from flash_dmattn.backends.triton import backward, forward, pairs, plan

    for module in (backward, forward, pairs, plan):
        for value in vars(module).values():
            if isinstance(value, triton.runtime.autotuner.Autotuner):
                value = value.fn
            if isinstance(value, triton.runtime.JITFunction):
                yield value
