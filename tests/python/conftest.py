import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads; machines that test are shared

import hypothesis
import torch

# The same examples on every run; HYPOTHESIS_PROFILE=thorough looks at many more, and at new ones each time.
hypothesis.settings.register_profile(
    "ci", derandomize=True, max_examples=50, deadline=None, database=None, print_blob=True
)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(min(2, torch.get_num_threads()))
