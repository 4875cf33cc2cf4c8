"""Pages in a real browser: the system's Chromium, driven by Playwright.

A module of tests says ``pytest_plugins = ["browsing"]`` and asks for the fixture ``visit``.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

# Seconds after which the browser of a module is ended, so that no page in a loop keeps the tests waiting.
LIMIT = 900
# Playwright's own arguments switch off updates, extensions and the like; nothing finds a host.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND"]


def missing(what: str) -> NoReturn:
    """Skips the test by name, and fails it where CI says that all must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"the tests of pages need {what}, and CI is true: install it")
    pytest.skip(f"{what} is not installed")


def chromium() -> str:
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        missing("chromium")
    return found


def playwright() -> Any:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the package playwright")
    return sync_playwright()


@pytest.fixture(scope="module")
def running_chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for a module: Playwright keeps an event loop running, which other modules must not meet."""
    if shutil.which("timeout") is None:
        missing("timeout, of GNU coreutils,")
    limited = tmp_path_factory.mktemp("browser") / "chromium"
    limited.write_text(f'#!/bin/sh\nexec timeout --signal=KILL {LIMIT} {shlex.quote(chromium())} "$@"\n')
    limited.chmod(0o700)
    with playwright() as found:
        launched = found.chromium.launch(executable_path=limited, args=ARGUMENTS, timeout=60_000)
        yield launched
        launched.close()


@pytest.fixture
def visit(running_chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens files; what goes wrong on their pages fails the test when it ends.

    ``calm`` asks for reduced motion, ``clock`` for a clock that ``page.clock.run_for`` moves forward.
    """
    contexts: list[BrowserContext] = []
    troubles: list[str] = []

    def opened(
        path: Path,
        *,
        width: int = 1280,
        height: int = 900,
        scheme: Literal["light", "dark"] = "light",
        calm: bool = False,
        script: bool = True,
        clock: bool = False,
    ) -> Page:
        context = running_chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            reduced_motion="reduce" if calm else "no-preference",
            java_script_enabled=script,
        )
        contexts.append(context)
        listen(context, troubles)
        context.set_default_timeout(10_000)
        page = context.new_page()
        if clock:
            page.clock.install()
        page.goto(path.as_uri(), timeout=30_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def listen(context: BrowserContext, troubles: list[str]) -> None:
    """Notes all that is said on the console, every error, and every request for what is not in a file."""

    def asked(address: str) -> None:
        if not address.startswith(("file:", "data:")):
            troubles.append(f"request: {address}")

    context.on("console", lambda message: troubles.append(f"console: {message.text}"))
    context.on("weberror", lambda error: troubles.append(f"error: {error.error}"))
    context.on("request", lambda request: asked(request.url))
