"""The web page in a real browser, on a desktop's width and a phone's. With PICTURES=1 the pictures of the docs are taken anew."""

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
from tests.support.chatbots import Model, chatting
from tests.support.chromium import DESKTOP, PHONE, at_rest, barriers, chromium, opened
from tests.support.demo import demo
from tests.support.ports import free_port
from tests.support.proxy import Proxy

pytestmark = pytest.mark.faults  # Takes long.

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
DEVICES = pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])


@pytest.fixture
async def chrome() -> AsyncGenerator[Browser]:
    async with chromium() as started:
        yield started


@pytest.fixture
def complaints() -> list[str]:
    return []


async def ask(page: Page, text: str) -> None:
    """Ask, and wait for the answer's end."""
    await page.get_by_label("Your question").fill(text)
    await page.keyboard.press("Enter")
    await expect(page.locator(".bubble").last).to_have_text(text)
    await expect(page.locator("#talk")).to_have_attribute("aria-busy", "false")


async def take(page: Page, name: str) -> None:
    """Take a picture for the docs."""
    if os.environ.get("PICTURES"):
        PICTURES.mkdir(exist_ok=True)
        await at_rest(page)
        await page.screenshot(path=PICTURES / f"{name}.png", scale="css", caret="initial")


@pytest.mark.timeout(180)
async def test_a_conversation_survives_a_reload_and_a_restart_of_everything(
    chrome: Browser, complaints: list[str], folder: Path
) -> None:
    ports = (free_port(), free_port())
    async with (
        opened(chrome, complaints, **DESKTOP) as desktop,
        opened(chrome, complaints, **PHONE) as phone,
    ):
        pages = {"desktop": desktop, "phone": phone}
        async with demo(folder / "data", ports) as address:
            for name, page in pages.items():
                await page.goto(address)
                await take(page, f"chatbot-{name}-new")
                await ask(page, "Is a message ever stored twice?")
                await expect(page.get_by_role("region", name="Sources").last).to_contain_text(
                    "never stored twice"
                )
                await ask(page, "What happens when a server dies?")
                await page.locator("summary").first.click()
                await expect(page.locator(".passage").first).to_be_visible()
                await page.locator("summary").first.click()
                await page.reload()
                await there(page)
            await take(desktop, "chatbot-desktop")
            await take(phone, "chatbot-phone")
            await desktop.emulate_media(color_scheme="dark")
            await take(desktop, "chatbot-desktop-dark")
        async with demo(folder / "data", ports):
            for page in pages.values():
                await page.reload()
                await there(page)
                await ask(page, "How does search find things?")
                await expect(page.locator(".bubble")).to_have_count(3)
    assert complaints == []


async def there(page: Page) -> None:
    """See that the conversation of the test is shown, with sources and its title."""
    await expect(page.locator(".bubble")).to_have_text(
        ["Is a message ever stored twice?", "What happens when a server dies?"]
    )
    await expect(page.get_by_role("region", name="Sources")).to_have_count(2)
    await expect(page.get_by_role("heading", level=1)).to_have_text(
        "Is a message ever stored twice?"
    )


@DEVICES
async def test_conversations_are_found_renamed_and_deleted(
    chrome: Browser, bot: str, complaints: list[str], device: dict[str, Any]
) -> None:
    async with opened(chrome, complaints, **device) as page:
        narrow = device is PHONE

        async def side() -> None:
            if narrow:
                await page.get_by_role("button", name="Show the list").click()

        await page.goto(bot)
        await ask(page, "Do herons wade?")
        first = page.url
        await side()
        await page.locator("a.new").click()
        await expect(
            page.get_by_role("heading", name="What would you like to know?")
        ).to_be_visible()
        await ask(page, "And egrets?")
        await side()
        await page.get_by_label("Search your conversations").fill("herons")
        await expect(page.locator(".snippet mark")).to_have_text("herons")
        await page.locator("a.hit").first.click()
        await expect(page).to_have_url(
            f"{first}#{await page.locator('.said').first.get_attribute('id')}"
        )
        await expect(page.locator(".bubble")).to_have_text("Do herons wade?")

        await page.get_by_role("button", name="Rename this").click()
        await page.get_by_label("Title").fill("Of wading birds")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Of wading birds")
        await expect(page).to_have_title("Of wading birds · Chatbot")

        await page.get_by_role("button", name="Delete this").click()
        await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Of wading birds")
        await page.get_by_role("button", name="Delete this").click()
        await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        await expect(page).to_have_url(f"{bot}/")
        await page.goto(first)
        await expect(
            page.get_by_role("heading", name="There is no such conversation")
        ).to_be_visible()
        await page.go_back()
        wide = await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wide, "the page scrolls sideways"
    assert complaints == []


@asynccontextmanager
async def in_the_middle(
    chrome: Browser, server: Server, model: Model, complaints: list[str]
) -> AsyncGenerator[Page]:
    """Give a page on which a long answer has begun."""
    model.words, model.pause = [f"word{n} " for n in range(1000)], 0.03
    async with (
        model.serving() as settings,
        chatting(server.address, **settings) as address,
        opened(chrome, complaints, **DESKTOP) as page,
    ):
        await page.goto(address)
        await page.get_by_label("Your question").fill("Go on")
        await page.keyboard.press("Enter")
        await expect(page.locator(".prose").last).to_contain_text("word5")
        yield page


async def test_an_answer_can_be_stopped_and_what_there_is_stays(
    chrome: Browser, server: Server, model: Model, complaints: list[str]
) -> None:
    async with in_the_middle(chrome, server, model, complaints) as page:
        await page.get_by_role("button", name="Stop the answer").click()
        await expect(page.locator(".remark")).to_have_text(
            "This answer was stopped before its end."
        )
        await page.reload()
        async with asyncio.timeout(30):
            # The backend hears of it, and stores what there is, a moment later.
            while (
                await page.locator(".said").count() < 2
                or not await page.locator(".prose").inner_text()
            ):
                await page.reload()
                await expect(page.locator(".bubble")).to_be_visible()
        await expect(page.locator(".prose")).to_contain_text("word0 word1 word2")
        await expect(page.locator(".remark")).to_have_text(
            "This answer was stopped before its end."
        )
    assert complaints == []


async def test_another_conversation_is_begun_in_the_middle_of_an_answer(
    chrome: Browser, server: Server, model: Model, complaints: list[str]
) -> None:
    async with in_the_middle(chrome, server, model, complaints) as page:
        await page.locator("a.new").click()
        await expect(page.locator("#talk")).to_have_attribute("aria-busy", "false")
        model.words, model.pause = ["Herons ", "wade."], 0.0
        await ask(page, "Do herons wade?")
        await expect(page.locator(".prose")).to_have_text("Herons wade.")
        await page.get_by_role("link", name="Go on").click()
        await expect(page.locator(".remark")).to_have_text(
            "This answer was stopped before its end."
        )
    assert complaints == []


async def test_the_page_says_when_history_is_not_saved_and_when_it_is_again(
    chrome: Browser, server: Server, complaints: list[str]
) -> None:
    async with (
        Proxy(server.address) as proxy,
        chatting(proxy.address, history_timeout=2.0) as address,
        opened(chrome, complaints, **DESKTOP) as page,
    ):
        await page.goto(address)
        await expect(page.get_by_role("status")).to_have_text("Conversations are saved")
        proxy.refuse()
        await ask(page, "Hello?")
        await expect(page.get_by_role("alert")).to_contain_text("not being saved")
        await expect(page.locator(".remark.warn")).to_have_text("Not saved")
        await take(page, "chatbot-desktop-away")
        assert await barriers(page) == []
        proxy.accept()
        await expect(page.get_by_role("alert")).to_be_hidden()
        await expect(page.get_by_role("status")).to_have_text("Conversations are saved")
        await ask(page, "Again?")
        await expect(page.locator(".remark.warn")).to_have_count(1)
    assert complaints == []


@DEVICES
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_keeps_people_out(
    chrome: Browser, bot: str, complaints: list[str], device: dict[str, Any], scheme: Any
) -> None:
    async with opened(chrome, complaints, color_scheme=scheme, **device) as page:
        await page.goto(bot)
        await expect(page.get_by_role("heading", level=2).first).to_be_visible()
        assert await barriers(page) == []
        await ask(page, "Do herons wade?")
        assert await barriers(page) == []
        if device is PHONE:
            await page.get_by_role("button", name="Show the list").click()
            assert await barriers(page) == []
            await page.keyboard.press("Escape")
        await page.get_by_role("button", name="Rename this").click()
        assert await barriers(page) == []


async def test_everything_can_be_done_by_keyboard(
    chrome: Browser, bot: str, complaints: list[str]
) -> None:
    async with opened(chrome, complaints, **DESKTOP) as page:
        await page.goto(bot)
        await expect(page.get_by_label("Your question")).to_be_focused()
        await page.keyboard.type("Do herons wade?")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("Yes?")
        await page.keyboard.press("Enter")
        await expect(page.locator("#talk")).to_have_attribute("aria-busy", "false")
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
    assert complaints == []


async def test_what_is_said_is_never_read_as_html(
    chrome: Browser, server: Server, model: Model, complaints: list[str]
) -> None:
    attack = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) <script>alert(1)</script> **<b>bold</b>**"
    model.words = [attack]
    async with (
        model.serving() as settings,
        chatting(server.address, **settings) as address,
        opened(chrome, complaints, **DESKTOP) as page,
    ):
        await page.goto(address)
        await ask(page, attack)
        await page.get_by_label("Search your conversations").fill("bold")
        await expect(page.locator("a.hit")).to_have_count(2)
        assert (
            await page.locator(
                ".talk img, .talk script, .talk b, .list img, .list b, a[href^=javascript]"
            ).count()
            == 0
        )
        await expect(page.locator(".prose strong")).to_have_text("<b>bold</b>")
    assert complaints == []
