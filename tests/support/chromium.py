"""A real browser."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import axe_playwright_python
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.tools import require_program

_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# How long to wait for what must come: a busy machine is no failure.
_PATIENCE = 30_000
expect.set_options(timeout=_PATIENCE)
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
}  # fmt: skip


@asynccontextmanager
async def chromium() -> AsyncGenerator[Browser]:
    """Start Debian's chromium."""
    program = require_program("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def open_page(browser: Browser, complaints: list[str], **device: Any) -> AsyncGenerator[Page]:
    """Open a page of somebody new; what its console complains of is noted."""
    context = await browser.new_context(**device, locale="en-GB", timezone_id="UTC")
    page = await context.new_page()
    page.set_default_timeout(_PATIENCE)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda said: (
            complaints.append(said.text)
            if said.type == "error" and "Failed to load" not in said.text
            else None
        ),
    )
    yield page
    await context.close()


async def wait_for_animations(page: Page) -> None:
    """Wait until nothing moves any more."""
    await page.evaluate(
        "Promise.allSettled(document.getAnimations({ subtree: true }).map(each => each.finished))"
    )


async def accessibility_violations(page: Page) -> list[str]:
    """Return what axe finds that keeps people out."""
    await wait_for_animations(page)
    script = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
    # As the browser's own tool does it: the page's policy does not hold for what is evaluated in it.
    await page.evaluate(script)
    found = await page.evaluate("axe.run()")
    return [
        f"{each['id']}: {each['help']} {[node['html'][:120] for node in each['nodes']]}"
        for each in found["violations"]
    ]
