"""The files of a connection string, which are read again for each new connection."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from service.store.db.dsn import Target, parse
from service.store.db.target_files import TargetFiles, TextFile
from tests.support.certificates import CertificateAuthority

SECRET = "npg_s3cret"


def file_of(path: Path) -> TextFile:
    return TextFile("DATABASE_URL_FILE", path)


def url(password: str, query: str = "") -> str:
    return f"postgresql://u:{password}@h/d{query}"


def password_of(target: Target) -> str | None:
    return target.url.password


def test_target_without_files_is_parsed_once() -> None:
    target = TargetFiles(parse, url(SECRET)).load()
    assert target.current() is target
    assert parse(url(SECRET)).current().read_again is None


def test_unchanged_file_gives_the_same_target(tmp_path: Path) -> None:
    path = tmp_path / "url"
    path.write_text(url(SECRET))
    target = TargetFiles(parse, file_of(path)).load()
    path.write_text(url(SECRET) + "\n")
    assert target.current() is target


def test_file_that_is_malformed_or_missing_leaves_the_last_target_in_use(tmp_path: Path) -> None:
    """A file is often replaced by removing it, or written in parts."""
    path = tmp_path / "url"
    path.write_text(url("first"))
    target = TargetFiles(parse, file_of(path)).load()
    path.unlink()
    assert password_of(target.current()) == "first"
    path.write_text("")
    assert password_of(target.current()) == "first"
    path.write_text("not a connection string")
    assert password_of(target.current()) == "first"
    path.write_text(url("second"))
    assert password_of(target.current()) == "second"


def test_symbolic_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    """Kubernetes replaces a mounted secret so."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "url").write_text(url(name))
    link = tmp_path / "data"
    link.symlink_to("first")
    target = TargetFiles(parse, file_of(link / "url")).load()
    (tmp_path / "new").symlink_to("second")
    (tmp_path / "new").replace(link)
    assert password_of(target.current()) == "second"


def test_password_of_the_file_replaces_that_of_the_string(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("a:/@#?% b\n")
    files = TargetFiles(parse, url("other"), TextFile("DATABASE_PASSWORD_FILE", path))
    assert password_of(files.load()) == "a:/@#?% b"
    path.write_text("new\r\n")
    assert password_of(files.current()) == "new"


def test_replaced_client_certificate_is_loaded_again(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    paths = tmp_path / "tls.crt", tmp_path / "tls.key"

    def write() -> None:
        for path, content in zip(paths, authority.issue("u"), strict=True):
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").replace(path)

    write()
    query = f"?sslmode=require&sslcert={paths[0]}&sslkey={paths[1]}"
    target = TargetFiles(parse, url(SECRET, query)).load()
    assert target.current() is target
    context = target.connect_args["ssl"]
    write()
    changed = target.current().connect_args["ssl"]
    assert isinstance(changed, ssl.SSLContext)
    assert changed is not context
    assert target.current().connect_args["ssl"] is changed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (SECRET.encode() + b"\xff", "is not UTF-8 text"),
        (SECRET.encode(), "not of the form"),
    ],
)
def test_bad_file_is_reported_without_its_content(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "url"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        TargetFiles(parse, file_of(path)).load()
    assert SECRET not in str(caught.value)
    if "form" not in words:
        assert str(path) in str(caught.value)
        assert "DATABASE_URL_FILE" in str(caught.value)


def test_password_file_of_libpq_is_left_to_the_driver() -> None:
    """It reads the file for each connection."""
    assert (
        parse("postgresql://u@h/d?passfile=/run/pgpass").connect_args["passfile"] == "/run/pgpass"
    )
