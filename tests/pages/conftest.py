"""The browser of these tests."""

import os

import pytest

from tests.pages.browser import Browser, found


@pytest.fixture(scope="session")
def browser():
    """One headless Chromium for all of them; where everything is required, it is too."""
    if found() is None:
        say = pytest.fail if os.environ.get("OFTFX_REQUIRE_ALL") else pytest.skip
        say("no Chromium here; tools/environment-browser installs it")
    made = Browser()
    yield made
    made.close()
