"""The accessibility checker axe-core runs on the pages, in headless Chromium.

Server and origin are real.  The tests are skipped if npm or Chromium is missing, but fail if CI is
set in the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import test_browser, test_web_players
from tests.origin import Origin
from tests.server import Site
from tests.test_browser import Look, Scheme, many_streams

# Fixtures.
browser, look = test_browser.browser, test_browser.look
browser_before_each_test = test_browser._browser_before_each_test
packages = test_web_players.packages

Serve = Callable[..., Site]
UNFOLD = "document.querySelectorAll('details:not(.group)').forEach(each => { each.open = true })"

pytestmark = pytest.mark.long


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("count", [1, 12, 300])
def test_pages_have_no_accessibility_violations(
    origin: Origin, serve: Serve, look: Look, packages: Path, count: int, scheme: Scheme
) -> None:
    site = serve(many_streams(origin, count))
    site.watch("/news").read(188)
    if count > 1:
        assert site.get("/bad").status == 502
    checker = (packages / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")
    for path in ("/", "/?group=Sport", "/?q=nothing", "/news", "/bad", "/nobody"):
        visit = look(site.url + path, 1280, scheme)
        visit.measure(UNFOLD)
        visit.measure(checker)
        found = visit.measure("axe.run(document)")
        assert found["passes"]
        violations = [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]]
        assert violations == [], path
