"""The page in a headless Chromium, against a live server with the shipped small model."""

import base64
import io
import json
import shutil
import subprocess
import sys
import time
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

from tests.support.served import serving, small_model

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address():
    with serving(small_model) as (server, _):
        yield server.address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page; at the end nothing may have been complained of, or been fetched from elsewhere."""
    contexts, complaints, hosts = [], [], set()

    def visit(fragment="", **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.goto(address + "/" + fragment)
        page.wait_for_selector("#big:not([hidden])")
        settled(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not [words for words in complaints if not words.startswith("Failed to load resource")]
    assert hosts - {None, ""} == {"127.0.0.1"}


def until(page, condition: str):
    """What JavaScript says, once it is true. Asked from outside, for the page itself may evaluate no words."""
    for _ in range(1500):
        if value := page.evaluate(condition):
            return value
        time.sleep(0.02)
    raise AssertionError(f"never: {condition}")


def settled(page):
    until(page, "!flying && !next && pictures[0]?.body.prompt === document.getElementById('prompt').value.trim()")


def shown(page) -> bytes:
    return base64.b64decode(page.get_attribute("#big", "src").partition(",")[2])


def pixels(file: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(file)))


def test_pictures_come_while_one_types(opened):
    """One request in flight, and fewer requests than keys; the last words are drawn."""
    page, flying, most, count = opened(), set(), [0], [0]

    def sent(request):
        if "generations" in request.url:
            flying.add(request)
            most[0], count[0] = max(most[0], len(flying)), count[0] + 1

    page.on("request", sent)
    page.on("requestfinished", lambda request: flying.discard(request))
    page.fill("#prompt", "")
    page.type("#prompt", "three small green squares on white", delay=15)
    settled(page)
    assert most[0] == 1
    assert 1 <= count[0] < 34 / 2
    assert page.evaluate("pictures[0].body.prompt") == "three small green squares on white"
    assert len(page.query_selector_all(".seed img:not([hidden])")) == 4


def test_a_seed_is_kept_and_the_link_restores_everything(opened):
    page = opened()
    page.click(".seed:nth-child(3)")
    page.fill("#steps", "4")
    page.select_option("#size", index=1)
    page.fill("#seed", "40")
    page.click("summary")
    page.fill("#negative", "a circle")
    settled(page)
    again = opened("#" + page.url.partition("#")[2])
    assert json.loads(again.evaluate("JSON.stringify(one())")) == {
        "prompt": page.input_value("#prompt"),
        "model": "world",
        "size": "80x48",
        "seed": 42,
        "num_inference_steps": 4,
        "negative_prompt": "a circle",
    }
    assert shown(again) == shown(page)
    assert pixels(shown(page)).shape == (48, 80, 3)


def test_teacher_against_student_over_the_same_noise(opened):
    page = opened()
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    until(page, "versus !== null")
    cost = page.inner_text("#cost")
    assert "50 calls" in cost and "2 calls" in cost and "as fast" in cost
    before = page.evaluate("getComputedStyle(document.getElementById('over')).clipPath")
    page.fill("#cut", "80")
    assert page.evaluate("getComputedStyle(document.getElementById('over')).clipPath") != before
    page.click("#against")
    assert page.is_hidden("#over")


def test_what_is_copied_draws_the_picture(opened, tmp_path):
    page = opened()
    page.click(".seed:nth-child(2)")
    for button, run in (("#as-python", [sys.executable, "-c"]), ("#as-curl", ["bash", "-c"])):
        page.click(button)
        text = until(page, "window.lastCopied")
        subprocess.run([*run, text], cwd=tmp_path, check=True, timeout=60)
        assert (tmp_path / "picture.png").read_bytes() == shown(page), button
        page.evaluate("window.lastCopied = null")


def test_a_saved_png_carries_its_recipe(opened, tmp_path):
    page = opened()
    with page.expect_download() as download:
        page.click("#png")
    download.value.save_as(tmp_path / "saved.png")
    with Image.open(tmp_path / "saved.png") as file:
        recipe = file.info
    assert (recipe["prompt"], recipe["seed"], recipe["steps"]) == (page.input_value("#prompt"), "0", "2")
    assert download.value.suggested_filename == "a-red-ring-left-of-a-square-0.png"


def test_it_says_what_the_small_model_understands(opened):
    page = opened()
    page.fill("#prompt", "a red unicorn")
    assert "unicorn" in page.inner_text("#unknown")
    page.click("#chips button:nth-child(2)")
    settled(page)
    assert page.input_value("#prompt") == "three green squares" and not page.inner_text("#unknown")


def test_other_seeds_by_the_keyboard(opened):
    page = opened()
    first = shown(page)
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    time.sleep(0.1)
    settled(page)
    assert page.input_value("#seed") != "0" and shown(page) != first


def test_a_refusal_is_told_in_words(opened):
    page = opened()
    page.route(
        "**/generations", lambda route: route.fulfill(status=400, body='{"error": {"message": "not like this"}}')
    )
    page.fill("#prompt", "a ring")
    until(page, "document.getElementById('says').textContent === 'not like this'")
    page.unroute("**/generations")
    page.fill("#prompt", "a circle")
    settled(page)


@pytest.mark.parametrize("width", [1280, 820, 390, 320])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 384) == (scheme == "light")
    for button in page.query_selector_all("button:visible"):
        box = button.bounding_box()
        assert box is None or box["height"] >= 36, button.inner_text()
