"""The reports that the tests of this room share: each is built once, and copied for each test."""

import copy

import pytest
import report_sample

from profiling.report import build


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    return {
        "whole": build.build(report_sample.whole_run(folder / "whole")),
        "bare": build.build(report_sample.bare_run(folder / "bare")),
    }


@pytest.fixture
def whole(reports):
    """The report of a complete run on an H200."""
    return copy.deepcopy(reports["whole"])


@pytest.fixture
def bare(reports):
    """The report of a run on a CPU of which hardly anything is known."""
    return copy.deepcopy(reports["bare"])
