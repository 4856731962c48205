"""What tests of runs share."""

from pathlib import Path

import pytest
from test_runs import labelled_records

from ecglib.records import Records


@pytest.fixture(scope="module")
def records() -> Records:
    """A data set for tiny studies; where a test module has records of its own, these are not used."""
    return labelled_records()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder for the module."""
    return tmp_path_factory.mktemp("results")
