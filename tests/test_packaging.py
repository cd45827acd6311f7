"""What pyproject.toml names is what lies on the disk, and what lies on the disk arrives in the wheel, once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_rlhf import __version__
from lightning_rlhf.commands.overview import answered
from lightning_rlhf.runtime.run_record import versions


ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"callbacks", "configs"}
"""Top-level folders that install inside the package."""


def shipped_files() -> set[str]:
    """Paths inside the wheel of every file of ours, the mapped folders under their installed names."""
    paths = set()
    for top in ("lightning_rlhf", *MAPPED):
        for path in (ROOT / top).rglob("*"):  # does not enter the links
            if path.is_file() and "__pycache__" not in path.parts:
                relative = path.relative_to(ROOT)
                paths.add((Path("lightning_rlhf") / relative if top in MAPPED else relative).as_posix())
    return paths


def folders(paths: set[str], pattern: str) -> set[str]:
    """Dotted names of the folders of the files whose name matches."""
    return {".".join(Path(path).parent.parts) for path in paths if Path(path).match(pattern)}


def test_package_list_names_every_folder() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == folders(shipped_files(), "__init__.py")


def test_every_python_file_lies_in_a_listed_package() -> None:
    homeless = folders(shipped_files(), "*.py") - set(PYPROJECT["tool"]["setuptools"]["packages"])
    assert not homeless, "add an __init__.py to the folder and its name to pyproject.toml"


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_links_serve_static_tools_and_uninstalled_runs(name: str) -> None:
    link = ROOT / "lightning_rlhf" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_constraints_pin_every_dependency_and_name_no_machine() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)  # a URL, a path or a range does not split in two
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    assert not [version for version in pinned.values() if "+" in version], "a local version exists on one machine only"
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["demo"] + extras["docs"] + extras["test"]:
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), line


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    """The metadata of an editable installation are those of the day on which it was made."""
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lightning_rlhf.__version__"}
    assert answered(["--version"])
    assert capsys.readouterr().out == f"lightning-rlhf {__version__}\n"
    assert versions()["lightning-rlhf"] == __version__


def test_malicious_uploads_are_excluded_by_name() -> None:
    requirement = next(r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "lightning")
    assert {"!=2.6.2", "!=2.6.3"} <= {str(specifier) for specifier in requirement.specifier}
    assert requirement.specifier.contains("2.6.6")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and a wheel built from that sdist, as ``python -m build`` makes them."""
    if find_spec("build") is None:
        pytest.skip("needs the package `build`")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "absent from the `packages`" not in run.stdout + run.stderr
    return folder


@pytest.mark.slow
def test_wheel_built_through_the_sdist_holds_every_file_once(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    counts = Counter(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)
    assert {name for name, count in counts.items() if count > 1} == set()
    assert set(counts) == shipped_files()
    assert {"lightning_rlhf/callbacks/__init__.py", "lightning_rlhf/configs/quickstart.yaml"} <= set(counts)
    assert [name for name in counts if re.fullmatch(r"lightning_rlhf/prompts/data/\w+\.jsonl", name)]


@pytest.mark.slow
def test_sdist_holds_the_mapped_folders_and_the_licence(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"LICENSE", "README.md", "pyproject.toml", "callbacks/__init__.py", "configs/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith(("lightning_rlhf/callbacks", "lightning_rlhf/configs"))]


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    where = "import lightning_rlhf.callbacks as c, lightning_rlhf.configs as f; print(c.__file__); print(f.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert [Path(line).is_relative_to(site) for line in run.stdout.split()] == [True, True]

    for arguments in (["--help"], ["fit", "--config", "quickstart", "--print_config"]):
        command = [sys.executable, "-m", "lightning_rlhf", *arguments]
        run = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout
    assert "trainer:" in run.stdout


def test_dockerfiles_install_what_the_demo_installs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    demo = re.search(r"^\$\(VENV\)/\.installed-demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert demo is not None
    wanted = [line.partition("$(INSTALL) ")[2] for line in demo[1].splitlines() if "$(INSTALL)" in line]
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (ROOT / name).read_text()
        installed = re.findall(r"pip install --constraint constraints\.txt (.*?)(?: \\)?$", text, re.MULTILINE)
        assert len(installed) == len(wanted) == 3
        for made, asked in zip(installed, wanted, strict=True):
            # the image has no editable install, and more extras than the demo
            assert set(re.sub(r"\S*\[.*?\]\S*", "", asked.replace("--editable", "")).split()) <= set(made.split())
        assert set(re.findall(r"\w+", re.findall(r"\[(.*?)\]", installed[1])[0])) <= extras
        python = re.search(r"^FROM python:(\d+\.\d+)", text, re.MULTILINE)
        assert python is not None
        assert f">={python[1]}" == PYPROJECT["project"]["requires-python"]
