"""The backends, best first. Each is a module with

    MISSING: str | None                         what keeps it from running here, and what to use instead
    DEVICES: tuple[str, ...]                    the types of devices whose tensors it takes
    DTYPES: tuple[torch.dtype, ...]             the dtypes that it takes
    attention(problem) -> out
    attention_with_lse(problem) -> (out, lse)
    probabilities(problem, lse) -> probs        without gradients

where `problem` is problem.Problem; one that is missing may have MISSING alone. They import slow things on first use.
"""

from . import cpu, cuda, flex, triton

BACKENDS = {"cuda": cuda, "triton": triton, "flex": flex, "cpu": cpu}
