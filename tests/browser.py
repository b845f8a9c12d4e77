"""Chromium for tests of pages: the system's, driven by playwright; what goes wrong on a page fails the test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"browser: none of {', '.join(NAMES)} is installed")
    api = pytest.importorskip("playwright.sync_api", reason="browser: playwright is not installed")
    with api.sync_playwright() as playwright:
        # A container's root may not use the sandbox; the pages are our own files.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, file: Path, state: str = "", **context: Any) -> Iterator[Any]:
    """The page of a file, its graphs drawn; fails at its end if the console, a script or a request reported a fault."""
    made = browser.new_context(viewport={"width": 1400, "height": 900}, **context)
    faults: list[str] = []
    page = made.new_page()
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"raised: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    page.on("request", lambda request: faults.append(f"asked: {request.url}") if request.url[:5] != "file:" else None)
    try:
        page.goto(file.as_uri() + state)
        page.wait_for_function("performance.getEntriesByName('graphs').length > 0")
        yield page
        assert faults == []
    finally:
        made.close()
