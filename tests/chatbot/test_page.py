"""The web page in a real browser, as wide as a desktop and as wide as a phone.

With PICTURES=1 the screenshots of the documentation are taken again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from service.server import Server
from tests.support.chatbots import ModelServer, serving_chatbot
from tests.support.chromium import (
    DESKTOP,
    PHONE,
    accessibility_violations,
    chromium,
    open_page,
    wait_for_animations,
)
from tests.support.demo import running_demo
from tests.support.ports import free_port
from tests.support.proxy import Proxy

pytestmark = pytest.mark.faults  # Slow.

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
DEVICES = pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])


@pytest.fixture
async def chrome() -> AsyncGenerator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
def page_errors() -> list[str]:
    """Return a list that collects errors of the browser's console."""
    return []


async def ask(page: Page, text: str) -> None:
    """Ask, and wait until the answer is complete."""
    await page.get_by_label("Your question").fill(text)
    await page.keyboard.press("Enter")
    await expect(page.locator(".bubble").last).to_have_text(text)
    await expect(page.locator("#messages")).to_have_attribute("aria-busy", "false")


async def screenshot(page: Page, name: str) -> None:
    """Take a screenshot for the documentation, if they are wanted."""
    if os.environ.get("PICTURES"):
        PICTURES.mkdir(exist_ok=True)
        await wait_for_animations(page)
        await page.screenshot(path=PICTURES / f"{name}.png", scale="css", caret="initial")


@pytest.mark.timeout(180)
async def test_conversation_is_shown_again_after_a_reload_and_a_restart_of_the_demo(
    chrome: Browser, page_errors: list[str], folder: Path
) -> None:
    ports = (free_port(), free_port())
    async with (
        open_page(chrome, page_errors, **DESKTOP) as desktop,
        open_page(chrome, page_errors, **PHONE) as phone,
    ):
        pages = {"desktop": desktop, "phone": phone}
        async with running_demo(folder / "data", ports) as address:
            for name, page in pages.items():
                await page.goto(address)
                await screenshot(page, f"chatbot-{name}-new")
                await ask(page, "Is a message ever stored twice?")
                await expect(page.get_by_role("region", name="Sources").last).to_contain_text(
                    "never stored twice"
                )
                await ask(page, "What happens when a server dies?")
                await page.locator("summary").first.click()
                await expect(page.locator(".passage").first).to_be_visible()
                await page.locator("summary").first.click()
                await page.reload()
                await expect_conversation(page)
            await screenshot(desktop, "chatbot-desktop")
            await screenshot(phone, "chatbot-phone")
            await desktop.emulate_media(color_scheme="dark")
            await screenshot(desktop, "chatbot-desktop-dark")
        async with running_demo(folder / "data", ports):
            for page in pages.values():
                await page.reload()
                await expect_conversation(page)
                await ask(page, "How does search find things?")
                await expect(page.locator(".bubble")).to_have_count(3)
    assert page_errors == []


async def expect_conversation(page: Page) -> None:
    """Expect the conversation of this test, with its sources and title."""
    await expect(page.locator(".bubble")).to_have_text(
        ["Is a message ever stored twice?", "What happens when a server dies?"]
    )
    await expect(page.get_by_role("region", name="Sources")).to_have_count(2)
    await expect(page.get_by_role("heading", level=1)).to_have_text(
        "Is a message ever stored twice?"
    )


@DEVICES
async def test_conversations_can_be_searched_renamed_and_deleted(
    chrome: Browser, bot: str, page_errors: list[str], device: dict[str, Any]
) -> None:
    async with open_page(chrome, page_errors, **device) as page:

        async def open_sidebar() -> None:
            if device is PHONE:
                await page.get_by_role("button", name="Show the list").click()

        await page.goto(bot)
        await ask(page, "Do herons wade?")
        first = page.url
        await open_sidebar()
        await page.locator("a.new-conversation").click()
        await expect(
            page.get_by_role("heading", name="What would you like to know?")
        ).to_be_visible()
        await ask(page, "And egrets?")
        await open_sidebar()
        await page.get_by_label("Search your conversations").fill("herons")
        await expect(page.locator(".snippet mark")).to_have_text("herons")
        await page.locator("a.hit").first.click()
        await expect(page).to_have_url(
            f"{first}#{await page.locator('.message').first.get_attribute('id')}"
        )
        await expect(page.locator(".bubble")).to_have_text("Do herons wade?")

        await page.get_by_role("button", name="Rename this").click()
        await page.get_by_label("Title").fill("Wading birds")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Wading birds")
        await expect(page).to_have_title("Wading birds · Chatbot")

        await page.get_by_role("button", name="Delete this").click()
        await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Wading birds")
        await page.get_by_role("button", name="Delete this").click()
        await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        await expect(page).to_have_url(f"{bot}/")
        await page.goto(first)
        await expect(page.get_by_role("heading", name="Conversation not found")).to_be_visible()
        await page.go_back()
        fits = await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert fits, "the page scrolls sideways"
    assert page_errors == []


@asynccontextmanager
async def streaming_answer(
    chrome: Browser, server: Server, model: ModelServer, page_errors: list[str]
) -> AsyncGenerator[Page]:
    """Yield a page on which a long answer is streaming."""
    model.words, model.pause = [f"word{n} " for n in range(1000)], 0.03
    async with (
        model.serving() as settings,
        serving_chatbot(server.address, **settings) as address,
        open_page(chrome, page_errors, **DESKTOP) as page,
    ):
        await page.goto(address)
        await page.get_by_label("Your question").fill("Go on")
        await page.keyboard.press("Enter")
        await expect(page.locator(".prose").last).to_contain_text("word5")
        yield page


async def test_stopped_answer_is_stored_as_far_as_it_was_generated(
    chrome: Browser, server: Server, model: ModelServer, page_errors: list[str]
) -> None:
    async with streaming_answer(chrome, server, model, page_errors) as page:
        await page.get_by_role("button", name="Stop the answer").click()
        await expect(page.locator(".note")).to_have_text(
            "This answer was stopped before it was complete."
        )
        await page.reload()
        async with asyncio.timeout(30):
            # The backend notices the disconnect and stores the text a moment later.
            while (
                await page.locator(".message").count() < 2
                or not await page.locator(".prose").inner_text()
            ):
                await page.reload()
                await expect(page.locator(".bubble")).to_be_visible()
        await expect(page.locator(".prose")).to_contain_text("word0 word1 word2")
        await expect(page.locator(".note")).to_have_text(
            "This answer was stopped before it was complete."
        )
    assert page_errors == []


async def test_new_conversation_can_be_started_while_an_answer_is_streaming(
    chrome: Browser, server: Server, model: ModelServer, page_errors: list[str]
) -> None:
    async with streaming_answer(chrome, server, model, page_errors) as page:
        await page.locator("a.new-conversation").click()
        await expect(page.locator("#messages")).to_have_attribute("aria-busy", "false")
        model.words, model.pause = ["Herons ", "wade."], 0.0
        await ask(page, "Do herons wade?")
        await expect(page.locator(".prose")).to_have_text("Herons wade.")
        await page.get_by_role("link", name="Go on").click()
        await expect(page.locator(".note")).to_have_text(
            "This answer was stopped before it was complete."
        )
    assert page_errors == []


async def test_page_reports_an_outage_of_history_and_its_end(
    chrome: Browser, server: Server, page_errors: list[str]
) -> None:
    async with (
        Proxy(server.address) as proxy,
        serving_chatbot(proxy.address, history_timeout=2.0) as address,
        open_page(chrome, page_errors, **DESKTOP) as page,
    ):
        await page.goto(address)
        await expect(page.get_by_role("status")).to_have_text("Conversations are saved")
        proxy.refuse_connections()
        await ask(page, "Hello?")
        await expect(page.get_by_role("alert")).to_contain_text("not being saved")
        await expect(page.locator(".note.warn")).to_have_text("Not saved")
        await screenshot(page, "chatbot-desktop-outage")
        assert await accessibility_violations(page) == []
        proxy.accept_connections()
        await expect(page.get_by_role("alert")).to_be_hidden()
        await expect(page.get_by_role("status")).to_have_text("Conversations are saved")
        await ask(page, "Again?")
        await expect(page.locator(".note.warn")).to_have_count(1)
    assert page_errors == []


@DEVICES
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_has_no_accessibility_violations(
    chrome: Browser, bot: str, page_errors: list[str], device: dict[str, Any], scheme: Any
) -> None:
    async with open_page(chrome, page_errors, color_scheme=scheme, **device) as page:
        await page.goto(bot)
        await expect(page.get_by_role("heading", level=2).first).to_be_visible()
        assert await accessibility_violations(page) == []
        await ask(page, "Do herons wade?")
        assert await accessibility_violations(page) == []
        if device is PHONE:
            await page.get_by_role("button", name="Show the list").click()
            assert await accessibility_violations(page) == []
            await page.keyboard.press("Escape")
        await page.get_by_role("button", name="Rename this").click()
        assert await accessibility_violations(page) == []


async def test_page_can_be_used_with_the_keyboard_alone(
    chrome: Browser, bot: str, page_errors: list[str]
) -> None:
    async with open_page(chrome, page_errors, **DESKTOP) as page:
        await page.goto(bot)
        await expect(page.get_by_label("Your question")).to_be_focused()
        await page.keyboard.type("Do herons wade?")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("Yes?")
        await page.keyboard.press("Enter")
        await expect(page.locator("#messages")).to_have_attribute("aria-busy", "false")
        await expect(page.locator(".bubble")).to_have_text("Do herons wade?\nYes?")
        await page.keyboard.press("Control+k")
        await expect(page.get_by_label("Search your conversations")).to_be_focused()
        await page.keyboard.type("herons")
        await expect(page.locator("a.hit")).to_have_count(1)
        await page.keyboard.press("Escape")
        await expect(page.locator("a.hit")).to_have_count(0)
        await page.keyboard.press("Tab")
        await expect(page.locator("a.entry")).to_be_focused()
        await page.keyboard.press("Enter")
        await page.get_by_role("button", name="Rename this").focus()
        await page.keyboard.press("Enter")
        await page.keyboard.type("Wading")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Wading")
    assert page_errors == []


async def test_messages_are_never_parsed_as_html(
    chrome: Browser, server: Server, model: ModelServer, page_errors: list[str]
) -> None:
    attack = (
        "<img src=x onerror=alert(1)> [x](javascript:alert(1)) <script>alert(1)</script> "
        "**<b>bold</b>**"
    )
    model.words = [attack]
    async with (
        model.serving() as settings,
        serving_chatbot(server.address, **settings) as address,
        open_page(chrome, page_errors, **DESKTOP) as page,
    ):
        await page.goto(address)
        await ask(page, attack)
        await page.get_by_label("Search your conversations").fill("bold")
        await expect(page.locator("a.hit")).to_have_count(2)
        elements = "a[href^=javascript], :is(.messages, .session-list) :is(img, script, b)"
        await expect(page.locator(elements)).to_have_count(0)
        await expect(page.locator(".prose strong")).to_have_text("<b>bold</b>")
    assert page_errors == []
