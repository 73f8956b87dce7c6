"""The distributions agree on version and licence, and each builds from its folder alone."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import chathistory_client
import service
from tests.support.wheels import PROJECTS, ROOT, build

LICENSE = (ROOT / "LICENSE").read_bytes()


def metadata(archive: Path) -> tuple[Message, list[bytes]]:
    """Return the metadata of a wheel or sdist, and the licence texts in it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist()}
    else:
        with tarfile.open(archive) as sdist:
            files = {
                member.name: content.read()
                for member in sdist
                if (content := sdist.extractfile(member))
            }
    [text] = [
        text for name, text in files.items() if name.endswith((".dist-info/METADATA", "/PKG-INFO"))
    ]
    licenses = [text for name, text in files.items() if name.endswith("/LICENSE")]
    return email.message_from_bytes(text), licenses


@pytest.mark.parametrize("target", ["wheel", "sdist"])
@pytest.mark.parametrize("name", PROJECTS)
def test_a_distribution_names_version_licence_and_home(
    name: str, target: str, tmp_path: Path
) -> None:
    fields, licenses = metadata(build(PROJECTS[name], target, tmp_path))
    assert fields["Name"] == name
    assert fields["Version"] == service.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Author"] == "The ChatHistory Authors"
    assert fields["Description-Content-Type"] == "text/markdown"
    urls = dict(url.split(", ") for url in fields.get_all("Project-URL", []))
    assert urls["Repository"] == "https://github.com/chathistory/chathistory"
    assert urls["Documentation"] == "https://chathistory.github.io/chathistory/"
    assert licenses == [LICENSE]


@pytest.mark.parametrize("name", ["chathistory-client", "chathistory-stubs"])
def test_a_copy_of_the_folder_and_its_sdist_build(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(PROJECTS[name], copy, ignore=shutil.ignore_patterns("__pycache__", "dist"))
    sdist = build(copy, "sdist", tmp_path / "out")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    fields, licenses = metadata(build(unpacked, "wheel", tmp_path / "out"))
    assert fields["Version"] == service.__version__
    assert licenses == [LICENSE]


def test_the_service_sdist_builds_the_migrations_into_its_wheel(tmp_path: Path) -> None:
    sdist = build(ROOT, "sdist", tmp_path / "out")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build(unpacked, "wheel", tmp_path / "out")) as wheel:
        names = wheel.namelist()
    assert "service/__init__.py" in names
    assert "service/migrations/env.py" in names


def test_every_copy_of_the_version_is_current() -> None:
    command = [sys.executable, "scripts/version.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert chathistory_client.__version__ == service.__version__


def test_the_changelog_has_a_dated_section_for_the_version() -> None:
    heading = rf"^## \[{re.escape(service.__version__)}\] - \d{{4}}-\d\d-\d\d$"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
