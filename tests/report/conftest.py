"""The browser of the tests that look at pages in one."""

from __future__ import annotations

import pytest

from tests.helpers.chromium import Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
