"""The page in a real Chromium: sign-in, keys, undo, payloads, widths, and a server that is killed under an open page.

Needs selenium, and Debian's chromium and chromium-driver; skipped without.
"""

from __future__ import annotations

import json
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


webdriver: Any = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = which("chromium"), which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs chromium and chromium-driver", allow_module_level=True)

PAYLOAD = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script> ![x](http://127.0.0.1:9/x)"
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
    """Wait up to ten seconds until something holds."""
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come true within ten seconds")


def press(browser: Any, keys: str) -> None:
    # keys count from 300 ms after a pair is shown
    time.sleep(0.5)
    webdriver.ActionChains(browser).send_keys(keys).perform()


def votes(server: Any) -> list[dict[str, Any]]:
    secrets = read_secrets(server.run_dir)
    assert secrets is not None
    text = Client(server.url, secrets.admin).text("/admin/votes.jsonl")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_a_person_judges_and_nothing_is_lost(tmp_path: Path, start_server: Callable[..., Any], browser: Any) -> None:
    server = start_server(tmp_path, undo_seconds=1000.0)
    items = [
        Item("k0", ({"role": "user", "content": PAYLOAD},), PAYLOAD, LONG, priority=9.0),
        *(Item(f"k{n}", ({"role": "user", "content": f"q{n}"},), f"a{n}", f"b{n}") for n in range(1, 8)),
    ]
    server.client.push("run", items, QueueOptions(overlap=0.0))
    link = re.search(r"http\S+", server.lines[1])
    assert link is not None
    browser.get(link.group())
    wait(lambda: browser.title == "Which response is better?")
    assert "#" not in browser.current_url
    for width in (1400, 800, 390):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        bar = browser.execute_script("return document.querySelector('.bar').getBoundingClientRect().bottom")
        assert bar <= 800, "the verdicts are on the screen, however long the responses"
    assert browser.execute_script("return document.querySelectorAll('#stage img, #stage script').length") == 0
    assert browser.title == "Which response is better?", "no payload ran"
    press(browser, "1")
    wait(lambda: len(votes(server)) == 1)
    (vote,) = votes(server)
    assert (vote["key"], vote["verdict"] == vote["first"], vote["strength"]) == ("k0", True, 3)

    press(browser, "u")
    wait(lambda: browser.execute_script("return document.querySelectorAll('[aria-pressed=true]').length") == 1)
    press(browser, "b")
    wait(lambda: len(votes(server)) == 2)
    assert votes(server)[1]["verdict"] == "both_bad" and votes(server)[1]["supersedes"] == vote["uid"]

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
