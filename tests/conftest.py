"""Hypothesis profiles, chosen by HYPOTHESIS_PROFILE, and one thread for each test process."""

import os

import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)

settings.register_profile("default", max_examples=400, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=20_000, deadline=None, print_blob=True)
# For planted bugs: the examples of the default profile, without the search for a smaller one.
settings.register_profile(
    "planted", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate], print_blob=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
