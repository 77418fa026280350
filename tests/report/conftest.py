"""One browser for all tests of pages."""

import pytest
from helpers_browser import Browser


@pytest.fixture(scope="session")
def browser():
    with Browser() as found:
        yield found
