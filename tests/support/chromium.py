"""The chromium of Debian, driven by playwright."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import axe_playwright_python
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.tools import require_program

_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Long, so that a busy machine does not fail a test.
_TIMEOUT_MS = 30_000
expect.set_options(timeout=_TIMEOUT_MS)
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


@asynccontextmanager
async def chromium() -> AsyncGenerator[Browser]:
    """Start the browser."""
    program = require_program("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def open_page(browser: Browser, errors: list[str], **device: Any) -> AsyncGenerator[Page]:
    """Open a page with a profile of its own; append errors of its scripts and console to `errors`.

    Failed loads are left out: the tests of outages cause them on purpose.
    """
    context = await browser.new_context(**device, locale="en-GB", timezone_id="UTC")
    page = await context.new_page()
    page.set_default_timeout(_TIMEOUT_MS)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            errors.append(message.text)
            if message.type == "error" and "Failed to load" not in message.text
            else None
        ),
    )
    yield page
    await context.close()


async def wait_for_animations(page: Page) -> None:
    """Wait until all animations of a page have finished."""
    await page.evaluate(
        "Promise.allSettled("
        "document.getAnimations({ subtree: true }).map(animation => animation.finished))"
    )


async def accessibility_violations(page: Page) -> list[str]:
    """Return the violations of accessibility rules that axe finds on a page."""
    await wait_for_animations(page)
    script = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
    # The page's content security policy forbids an added script, but does not apply to `evaluate`.
    await page.evaluate(script)
    report = await page.evaluate("axe.run()")
    return [
        f"{violation['id']}: {violation['help']} "
        f"{[node['html'][:120] for node in violation['nodes']]}"
        for violation in report["violations"]
    ]
