"""Hypothesis profiles, chosen by HYPOTHESIS_PROFILE; one thread and one seed for each test."""

import os
from collections import defaultdict

import pytest
import torch
from hypothesis import Phase, settings

from tests import entrances

torch.set_num_threads(1)
# So many of the parameter sets of each scenario go through the other entrances too.
_PICKED = 2
_IS_PICKED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items):
    by_function = defaultdict(list)
    for item in items:
        if {"scenarios", "upstream_bugs"} & {*item.path.parts}:
            by_function[item.path, item.originalname].append(item)
    for found in by_function.values():
        for number in range(min(_PICKED, len(found))):
            found[number * len(found) // _PICKED].stash[_IS_PICKED] = True


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """A test that fails fails again."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _entrances(request, monkeypatch):
    picked = request.node.stash.get(_IS_PICKED, False)
    monkeypatch.setattr(entrances, "current", request.node.name if picked else None)


settings.register_profile("default", max_examples=400, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=20_000, deadline=None, print_blob=True)
# For planted bugs: the examples of the default profile, without the search for a smaller one.
settings.register_profile(
    "planted", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate], print_blob=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
