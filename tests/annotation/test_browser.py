"""The page in a real Chromium: sign-in, keys, undo, payloads, widths, and a server that is killed under an open page.

Also accessibility by axe-core, and the pictures of docs/people.md. Needs the extra ``browser``, and Debian's chromium
and chromium-driver (.ci/run installs them); skipped without. ``BROWSER_TESTS=required``, of `make test-browser`, fails
in their place, and runs axe-core on every panel in every color and width. ``WRITE_SCREENSHOTS=1`` writes the pictures.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from lightning_rlhf.annotation.client import Client
from lightning_rlhf.annotation.queues import Item, QueueOptions
from lightning_rlhf.annotation.serve import read_secrets


CHROMIUM, DRIVER = which("chromium"), which("chromedriver")
REQUIRED = os.environ.get("BROWSER_TESTS") == "required"
if REQUIRED:
    from selenium import webdriver

    assert CHROMIUM is not None and DRIVER is not None, "apt-get install chromium chromium-driver"
else:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromium-driver (apt-get install)", allow_module_level=True)

DOCS = Path(__file__).resolve().parents[2] / "docs"
WIDTHS = (1400, 800, 390)

PAYLOAD = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script> ![x](http://127.0.0.1:9/x)"
PAYLOADS: list[str] = json.loads(Path(__file__).with_name("payloads.json").read_text())
LONG = "\n\n".join(["A paragraph of patient prose about timber beams and their bending. " * 12] * 30)


@pytest.fixture
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(5)
    yield driver
    driver.quit()


def wait(condition: Callable[[], object]) -> None:
    """Wait up to thirty seconds until something holds."""
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come true within thirty seconds")


def sign_in(browser: Any, server: Any) -> None:
    """Follow the link that the server prints."""
    link = re.search(r"http\S+", server.lines[1])
    assert link is not None
    browser.get(link.group())
    wait(lambda: browser.title == "Which response is better?")


def resize(browser: Any, width: int, height: int = 800) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def scheme(browser: Any, value: str) -> None:
    """Ask for a light or a dark page."""
    features = [{"name": "prefers-color-scheme", "value": value}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def press(browser: Any, keys: str) -> None:
    # keys count from 300 ms after a pair is shown
    time.sleep(0.5)
    webdriver.ActionChains(browser).send_keys(keys).perform()


def votes(server: Any) -> list[dict[str, Any]]:
    secrets = read_secrets(server.run_dir)
    assert secrets is not None
    text = Client(server.url, secrets.admin).text("/admin/votes.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def harmless(browser: Any, server: Any) -> bool:
    """Whether the texts on the page left no elements of their own, no title, no dialog, and no request elsewhere."""
    elements = "return document.querySelectorAll('.text :is(a, b, details, form, iframe, img, script, style, svg)')"
    requests = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    return (
        browser.execute_script(elements) == []
        and browser.title == "Which response is better?"
        and all(address.startswith(server.url) for address in browser.execute_script(requests))
    )


@pytest.mark.slow
def test_a_person_judges_and_nothing_is_lost(tmp_path: Path, start_server: Callable[..., Any], browser: Any) -> None:
    server = start_server(tmp_path, undo_seconds=1000.0)
    items = [
        Item("k0", ({"role": "user", "content": PAYLOAD},), PAYLOAD, LONG, priority=9.0),
        # a blank line between two payloads, so that each begins a paragraph
        Item("k1", ({"role": "user", "content": "q1"},), "\n\n".join(PAYLOADS), PAYLOADS[0], priority=8.0),
        *(Item(f"k{n}", ({"role": "user", "content": f"q{n}"},), f"a{n}", f"b{n}") for n in range(2, 8)),
    ]
    server.client.push("run", items, QueueOptions(overlap=0.0))
    sign_in(browser, server)
    assert "#" not in browser.current_url
    for width in WIDTHS:
        resize(browser, width)
        bar = browser.execute_script("return document.querySelector('.bar').getBoundingClientRect().bottom")
        assert bar <= 800, "the verdicts are on the screen, however long the responses"
    assert harmless(browser, server)
    press(browser, "1")
    wait(lambda: len(votes(server)) == 1)
    (vote,) = votes(server)
    assert (vote["key"], vote["verdict"] == vote["first"], vote["strength"]) == ("k0", True, 3)

    press(browser, "u")
    wait(lambda: browser.execute_script("return document.querySelectorAll('[aria-pressed=true]').length") == 1)
    press(browser, "b")
    wait(lambda: len(votes(server)) == 2)
    assert votes(server)[1]["verdict"] == "both_bad" and votes(server)[1]["supersedes"] == vote["uid"]
    wait(lambda: "evil.example" in browser.find_element("id", "stage").text)
    assert harmless(browser, server)

    # the server dies under a page with a typed rationale
    press(browser, "w")
    webdriver.ActionChains(browser).send_keys("2 is right; 7 is a key, and here a digit").perform()
    server.stop(signal.SIGKILL)
    browser.find_element("css selector", "button[value=right2]").click()
    wait(lambda: "kept here" in browser.find_element("id", "status").text)
    again = start_server(tmp_path, port=server.port, undo_seconds=1000.0)
    wait(lambda: len(votes(again)) == 3)
    late = votes(again)[-1]
    assert (late["rationale"], late["strength"]) == ("2 is right; 7 is a key, and here a digit", 2)
    assert late["verdict"] != late["first"]
    # the text stays for screen readers when the box has faded
    wait(lambda: browser.execute_script("return document.getElementById('status').textContent") == "Kept.")
    time.sleep(2.5)
    assert len(votes(again)) == 3, "it arrived once"
    severe = [entry for entry in browser.get_log("browser") if "Content Security" in entry["message"]]
    assert severe == []


# -- pictures and accessibility ----------------------------------------------------------------------------------------

QUESTION = "My sourdough rises well in the bowl and then spreads flat in the oven. What should I change?"
FIRST = """Flat loaves usually mean that the dough was **overproofed**, or shaped without tension:

1. Shorten the second rise; poke the dough, and bake when the dent comes back slowly.
2. Shape twice, with a rest of 20 minutes in between.
3. Bake on a hot stone, and score at a shallow angle.

If it still spreads, use 3 % less water."""
SECOND = (
    "There are many possible reasons for this problem. Bread is complex, and every oven is different. You could try "
    "more flour, less flour, another flour, or another oven. Baking takes patience, and you will find your own way."
)


def study(server: Any) -> None:
    """Pairs that could come from a run, with guidelines and the verdict of an AI."""
    texts = [
        Item(f"k{n}", ({"role": "user", "content": QUESTION},), FIRST, SECOND, priority=-n, suggestion=0.87)
        for n in range(12)
    ]
    server.client.push("run", texts, QueueOptions(overlap=0.0, show_ai="after"))


@pytest.mark.slow
def test_pictures_of_the_docs_are_the_page_as_it_is(
    tmp_path: Path, start_server: Callable[..., Any], browser: Any
) -> None:
    image = pytest.importorskip("PIL.Image")
    server = start_server(tmp_path, undo_seconds=1000.0)
    study(server)
    sign_in(browser, server)
    press(browser, "2")
    # the sides of a pair are at random: the AI prefers the first text
    wait(lambda: "an AI prefers Response" in browser.find_element("id", "stage").text)
    pages = {f"pair-{width}": ("/", width, 900) for width in WIDTHS} | {"admin-1400": ("/admin", 1400, 700)}
    for name, (path, width, height) in pages.items():
        if path != "/":
            browser.get(server.url + path)
        resize(browser, width, height)
        wait(lambda: browser.execute_script("return document.fonts.status") == "loaded")
        data = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
        picture = image.open(io.BytesIO(data))
        assert picture.size == (width, height)
        # a page with text in it, and not a blank one
        assert len(picture.convert("L").getcolors()) > 50
        file = DOCS / "people" / f"{name}.png"
        if os.environ.get("WRITE_SCREENSHOTS") == "1":
            file.parent.mkdir(exist_ok=True)
            picture.convert("P", palette=image.Palette.ADAPTIVE, colors=128).save(file, optimize=True)
        assert image.open(file).size == (width, height), "make test-browser writes them anew"
        assert f"people/{file.name}" in (DOCS / "people.md").read_text()


def findings(browser: Any) -> list[str]:
    """Serious and critical findings of axe-core on the page that is open."""
    script = (
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations), e => done(String(e)));"
    )
    browser.execute_script(AXE.read_text())
    found = browser.execute_async_script(script)
    assert isinstance(found, list), found
    return [
        f"{entry['id']} ({entry['impact']}): {[node['target'] for node in entry['nodes']]}"
        for entry in found
        if entry["impact"] in ("serious", "critical")
    ]


AXE_PACKAGE = importlib.util.find_spec("axe_playwright_python")
AXE = Path(str(AXE_PACKAGE.origin)).parent / "axe.min.js" if AXE_PACKAGE else Path("axe.min.js")


@pytest.mark.slow
@pytest.mark.skipif(AXE_PACKAGE is None, reason="needs axe-playwright-python, which ships axe-core")
def test_axe_finds_nothing_serious_and_tab_alone_gives_a_verdict(
    tmp_path: Path, start_server: Callable[..., Any], browser: Any
) -> None:
    server = start_server(tmp_path, undo_seconds=1000.0)
    study(server)
    browser.get(f"{server.url}/join")
    assert findings(browser) == []
    sign_in(browser, server)
    for colors in ("light", "dark"):
        scheme(browser, colors)
        for width in (1400, 390):
            resize(browser, width)
            # the panels once, unless everything is asked for
            for panel in ("", "w", "f", "s") if REQUIRED or (colors, width) == ("light", 1400) else ("",):
                if panel:
                    press(browser, panel)
                assert findings(browser) == [], (colors, width, panel)
                webdriver.ActionChains(browser).send_keys("\ue00c").perform()
        for path in ("/admin", "/guidelines"):
            browser.get(server.url + path)
            assert findings(browser) == [], (colors, path)
        browser.get(server.url)
    # the tabulator and the enter key, and nothing else
    focused = ""
    for _ in range(60):
        webdriver.ActionChains(browser).send_keys("\ue004").perform()
        focused = browser.execute_script("return document.activeElement.value || ''")
        if focused == "right2":
            break
    assert focused == "right2"
    webdriver.ActionChains(browser).send_keys("\ue007").perform()
    wait(lambda: len(votes(server)) == 1)
    assert votes(server)[0]["strength"] == 2
