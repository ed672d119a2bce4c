"""Patterns of silences: the page finds what the server finds, and no pattern takes long."""

import random
import time
from fnmatch import fnmatchcase

from playwright.sync_api import Page

from tests.page.conftest import Filled

MATCHES = """async pairs => {
    const { matches } = await import("/page/js/data/patterns.js")
    return pairs.map(([pattern, text]) => matches(pattern, text))
}"""
SLOW = [("*a" * stars + "*b", "a" * 512) for stars in (4, 8, 100, 250)]
SLOW += [("*[a-z]" * 80 + "!", "a" * 512), ("*?" * 250 + "b", "a" * 512), ("[" * 512, "[" * 511)]


def test_the_page_matches_as_the_server_does(page: Page, filled: Filled) -> None:
    choose = random.Random(7)
    pairs = [
        (
            "".join(choose.choices("**??ab[]!-^\\\U0001f600", k=choose.randint(0, 8))),
            "".join(choose.choices("ab-]![\U0001f600^", k=choose.randint(0, 6))),
        )
        for _ in range(5_000)
    ] + [("[" + text + "]", text) for text in "*?[a"]
    page.goto(filled.url + "/alerts")
    found = page.evaluate(MATCHES, pairs)
    assert sum(found) > 100
    assert found == [fnmatchcase(text, pattern) for pattern, text in pairs]


def test_no_pattern_takes_long(page: Page, filled: Filled) -> None:
    page.goto(filled.url + "/alerts")
    started = time.monotonic()
    assert page.evaluate(MATCHES, SLOW) == [False] * len(SLOW)
    assert [fnmatchcase(text, pattern) for pattern, text in SLOW] == [False] * len(SLOW)
    assert time.monotonic() - started < 20, "by a regular expression, eight stars take longer than anybody waits"
