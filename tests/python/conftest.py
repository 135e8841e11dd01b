import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads; machines that test are shared

import hypothesis
import pytest
import torch

from devices import CUDA_DTYPES, DEVICES, poison

# The same examples on every run; HYPOTHESIS_PROFILE=thorough looks at many more, and at new ones each time.
common = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],  # `device` is one for all examples
}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=50, database=None, **common)
hypothesis.settings.register_profile("thorough", max_examples=2000, **common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: says something about the CPU only, in a module that runs on every device")
    config.addinivalue_line("markers", "large: takes many gigabytes of a GPU's memory")


@pytest.fixture(params=DEVICES)
def device(request):
    """Where a test's tensors are made, unless it says otherwise."""
    with torch.device(request.param):
        if request.param == "cuda":
            poison()
        yield request.param


def pytest_collection_modifyitems(config, items):
    """Leaves out on a GPU what it is not for."""

    def makes_sense(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("device") != "cuda":
            return True
        return not item.get_closest_marker("cpu") and parameters.get("dtype", torch.bfloat16) in CUDA_DTYPES

    left_out = [item for item in items if not makes_sense(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if makes_sense(item)]
