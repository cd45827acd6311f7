"""The manual as a site: it is built from the pages, is complete on the disk, and its search works from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from shutil import which

import pytest


ROOT = Path(__file__).parents[1]
FETCHED = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\ssrc="(?:https?:)?//|<link\b[^>]*\shref="(?:https?:)?//')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    assert [(page.name, tag) for page in pages for tag in FETCHED.findall(page.read_text(encoding="utf-8"))] == []


def test_formulas_are_mathml(site: Path) -> None:
    assert [page.name for page in site.rglob("*.html") if "arithmatex" in page.read_text(encoding="utf-8")] == []
    losses = (site / "losses.html").read_text(encoding="utf-8")
    dpo = re.search(r"<td><code>DPOLoss</code></td>\s*<td>(.*?)</td>", losses)
    assert dpo is not None
    assert re.sub("<[^>]*>", "", dpo[1]) == "&#x02212;log&#x003C3;&#x00028;&#x003B2;m&#x00029;"
    assert losses.count("<math") > 50


def test_the_search_works_from_the_disk(site: Path) -> None:
    if os.environ.get("BROWSER_TESTS") != "required":
        pytest.importorskip("selenium.webdriver", reason="needs selenium")
        if which("chromium") is None or which("chromedriver") is None:
            pytest.skip("needs chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(which("chromedriver")))
    try:
        driver.get((site / "index.html").as_uri())
        field = driver.find_element("css selector", "input.md-search__input")
        driver.execute_script("arguments[0].focus()", field)
        field.send_keys("desirable_weight")
        found: list[str] = []
        for _ in range(100):
            found = [link.text for link in driver.find_elements("css selector", ".md-search-result__link")]
            if found:
                break
            time.sleep(0.1)
        assert any("TRL" in text for text in found)
    finally:
        driver.quit()
