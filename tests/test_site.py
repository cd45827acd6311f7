"""The manual as a site: it is built from the pages, is complete on the disk, and its search works from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from shutil import which
from types import FunctionType

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
    assert losses.count("<math") > 40


def test_every_package_and_every_exported_name_is_on_a_page_of_the_api(site: Path) -> None:
    packages = {path.parent.name for path in (ROOT / "lightning_rlhf").glob("*/__init__.py")} - {"configs"}
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    named = re.findall(r"^::: lightning_rlhf\.([\w.]+)$", text, re.MULTILINE)
    assert packages - {name.partition(".")[0] for name in named} == set()
    html = "".join(page.read_text(encoding="utf-8") for page in sorted((site / "api").glob("*.html")))
    missing = []
    for package in sorted(packages & set(named)):
        module = import_module(f"lightning_rlhf.{package}")
        # submodules and type aliases have no docstrings of their own
        names = [name for name in module.__all__ if isinstance(getattr(module, name), type | FunctionType)]
        missing += [f"{package}.{name}" for name in names if f'id="lightning_rlhf.{package}.{name}"' not in html]
    assert missing == []


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
