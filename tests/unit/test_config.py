"""The configuration: its sources, and the reports of invalid and unknown settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service import config

SECRET = "s3cret"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder without a `.env`; tests/conftest.py has cleared the environment."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded_url() -> str | None:
    url = config.load().database_url
    return url.get_secret_value() if url else None


def test_load_without_settings_uses_defaults() -> None:
    settings = config.load()
    assert settings.listen == "127.0.0.1:50051"
    assert settings.data_dir == Path(".data")
    assert settings.database_url is None
    assert config.sources() == {}
    assert config.unknown_settings() == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DATABASE_URL": "a", "NEON_DATABASE_URL": "b"}, "a"),
        ({"NEON_DATABASE_URL": "b"}, "b"),
        ({"DATABASE_URL": "", "NEON_DATABASE_URL": "b"}, "b"),
        ({"DATABASE_URL": ""}, None),
    ],
)
def test_first_nonempty_database_url_variable_is_used(
    environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loaded_url() == expected


def test_environment_overrides_env_file(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / ".env").write_text(
        "NEON_DATABASE_URL='postgresql://u@h/d?a=b#c'\nCHAT_HISTORY_LISTEN=127.0.0.1:1\n"
    )
    monkeypatch.setenv("CHAT_HISTORY_LISTEN", "127.0.0.1:2")
    assert loaded_url() == "postgresql://u@h/d?a=b#c"
    assert config.load().listen == "127.0.0.1:2"
    assert config.sources() == {
        "CHAT_HISTORY_LISTEN": "the environment",
        "NEON_DATABASE_URL": ".env",
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "CHAT_HISTORY_LISTEN",
            "nowhere",
            "CHAT_HISTORY_LISTEN: 'nowhere' is not an address of the form host:port",
        ),
        ("CHAT_HISTORY_LISTEN", "127.0.0.1:65536", "is not an address"),
        (
            "CHAT_HISTORY_METRICS_LISTEN",
            ":9090",
            "CHAT_HISTORY_METRICS_LISTEN: ':9090' is not an address",
        ),
        ("CHAT_HISTORY_HEALTH_LISTEN", "h", "CHAT_HISTORY_HEALTH_LISTEN: 'h' is not an address"),
        ("CHAT_HISTORY_LISTEN", "0.0.0.0:50051", "not a loopback address"),
        ("CHAT_HISTORY_LISTEN", "[::]:50051", "not a loopback address"),
        (
            "CHAT_HISTORY_DB_POOL_SIZE",
            "0",
            "CHAT_HISTORY_DB_POOL_SIZE: input should be greater than 0",
        ),
        (
            "CHAT_HISTORY_DB_POOL_SIZE",
            SECRET,
            "CHAT_HISTORY_DB_POOL_SIZE: must be a whole number, without a unit",
        ),
        (
            "CHAT_HISTORY_PAGE_TOKEN_KEY",
            "short",
            "CHAT_HISTORY_PAGE_TOKEN_KEY: must have at least 16 characters",
        ),
        (
            "CHAT_HISTORY_MAX_BYTES_PER_USER",
            "999999999999",
            (
                "CHAT_HISTORY_MAX_BYTES_PER_USER=999999999999 is above "
                "CHAT_HISTORY_MAX_BYTES_IN_FLIGHT=100663296: lower it"
            ),
        ),
        ("CHAT_HISTORY_DB_PREPARED_STATEMENTS", SECRET, "should be 'auto', 'on' or 'off'"),
    ],
)
def test_invalid_value_is_reported_in_one_line_that_names_the_setting(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{SECRET}@h/d")
    monkeypatch.setenv(name, value)
    with pytest.raises(config.BadConfiguration) as refused:
        config.load()
    [problem] = refused.value.problems
    assert words in problem
    assert "\n" not in problem
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("DATABASE_URL", "DATABASE_URL_FILE"), "exclude each other"),
        (("NEON_DATABASE_URL", "DATABASE_URL_FILE"), "exclude each other"),
        (("DATABASE_READ_URL", "DATABASE_READ_URL_FILE"), "exclude each other"),
        (("DATABASE_PASSWORD_FILE",), "DATABASE_PASSWORD_FILE needs DATABASE_URL"),
    ],
)
def test_contradicting_sources_of_the_database_are_reported(
    names: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        monkeypatch.setenv(name, f"postgresql://u:{SECRET}@h/d")
    with pytest.raises(config.BadConfiguration, match=words) as refused:
        config.load()
    assert SECRET not in str(refused.value)


def test_total_may_be_lowered_below_the_defaults_of_users_and_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHAT_HISTORY_MAX_BYTES_IN_FLIGHT", str(16 * config.MIB))
    assert config.load().max_bytes_in_flight == 16 * config.MIB


def test_all_invalid_values_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_HISTORY_LISTEN", "nowhere")
    monkeypatch.setenv("CHAT_HISTORY_DB_POOL_SIZE", "none")
    with pytest.raises(config.BadConfiguration) as refused:
        config.load()
    assert len(refused.value.problems) == 2


def test_undecodable_env_file_is_reported(empty_folder: Path) -> None:
    (empty_folder / ".env").write_bytes(b"DATABASE_URL=\xff\xfe")
    with pytest.raises(config.BadConfiguration, match=r"\.env cannot be read"):
        config.load()


def test_unknown_settings_are_reported_with_suggestions(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / ".env").write_text("CHAT_HISTORY_LISTN=127.0.0.1:1\n")
    monkeypatch.setenv("CHAT_HISTORY_DATABASE_URL", "postgresql://u@h/d")
    monkeypatch.setenv("CHAT_HISTORY_ZZZ", "1")
    assert config.unknown_settings() == [
        "CHAT_HISTORY_DATABASE_URL in the environment is not a setting; did you mean DATABASE_URL?",
        "CHAT_HISTORY_LISTN in .env is not a setting; did you mean CHAT_HISTORY_LISTEN?",
        "CHAT_HISTORY_ZZZ in the environment is not a setting",
    ]


def test_settings_are_immutable_and_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{SECRET}@h/d")
    settings = config.load()
    assert SECRET not in f"{settings!r} {settings}"
    with pytest.raises(ValidationError):
        settings.listen = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:50051", ("::1", 50051)),
    ],
)
def test_split_address_returns_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert config.split_address(address) == parts


@pytest.mark.parametrize("name", ["pg_chat", "information_schema", "Chat", "1a", "a-b", "a" * 64])
def test_name_of_no_schema_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_HISTORY_DB_SCHEMA", name)
    with pytest.raises(config.BadConfiguration, match="CHAT_HISTORY_DB_SCHEMA"):
        config.load()


def test_schema_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load().db_schema is None
    monkeypatch.setenv("CHAT_HISTORY_DB_SCHEMA", "chat_1")
    assert config.load().db_schema == "chat_1"
