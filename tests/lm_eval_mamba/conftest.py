"""Shared by the tests of groups and comparisons."""

import pytest

from .stub import our_tasks


@pytest.fixture(scope="module")
def manager():
    return our_tasks()
