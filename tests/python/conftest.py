import datetime
import json
import os
import subprocess
from pathlib import Path

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


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="write which rows of the README's table of features passed",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "row(name): belongs to a row of the README's table of features")
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


OUTCOMES = ("passed", "skipped", "failed")  # the last of those of a row's tests counts
rows = {}


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        for name, place in report.user_properties:
            if name == "feature":
                row, backend, device = place
                line, outcomes = rows.get(row, (report.location[1], {}))
                column = f"{backend} {device}"
                outcomes[column] = max(outcomes.get(column, "passed"), report.outcome, key=OUTCOMES.index)
                rows[row] = min(line, report.location[1]), outcomes


def pytest_sessionfinish(session):
    file = session.config.getoption("record")
    if file is None or hasattr(session.config, "workerinput"):
        return
    commit = (
        os.environ.get("FLASH_DMATTN_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    )
    machine = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    # In the order of the module, whichever test was first.
    table = {row: outcomes for row, (_, outcomes) in sorted(rows.items(), key=lambda item: (item[1][0], item[0]))}
    file.write_text(json.dumps({"machine": machine, "rows": table}, indent=1, ensure_ascii=False) + "\n")
