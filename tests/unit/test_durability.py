"""The settings of PostgreSQL that are reported as weaker than promised."""

from __future__ import annotations

import pytest

from service.store.db.durability import DURABLE, find_weaknesses

SYNCHRONOUS = {"names_standbys": True}
# The settings that differ from the durable ones, then those that are reported, and whether
# acknowledged writes can be lost or requests fail.
TABLE: dict[str, tuple[dict[str, object], dict[str, bool]]] = {
    "durable": ({}, {}),
    "synchronous standbys": (SYNCHRONOUS | {"standby_count": 2}, {}),
    "stronger": (SYNCHRONOUS | {"synchronous_commit": "remote_apply"}, {}),
    "commit off": ({"synchronous_commit": "off"}, {"synchronous_commit": True}),
    "commit local": ({"synchronous_commit": "local"}, {"synchronous_commit": False}),
    "commit local, standbys": (
        SYNCHRONOUS | {"synchronous_commit": "local"},
        {"synchronous_commit": True},
    ),
    "commit remote_write, standbys": (
        SYNCHRONOUS | {"synchronous_commit": "remote_write"},
        {"synchronous_commit": True},
    ),
    "fsync": ({"fsync": False}, {"fsync": True}),
    "pages": ({"full_page_writes": False}, {"full_page_writes": True}),
    "warnings hidden": ({"client_min_messages": "error"}, {"client_min_messages": False}),
    "warnings hidden, standbys": (
        SYNCHRONOUS | {"client_min_messages": "error"},
        {"client_min_messages": True},
    ),
    "warnings": (SYNCHRONOUS | {"client_min_messages": "warning"}, {}),
    "isolation": ({"isolation": "serializable"}, {"default_transaction_isolation": False}),
    "asynchronous standbys": ({"standby_count": 1}, {"synchronous_standby_names": False}),
    "no messages in the log": ({"may_confirm": False}, {"pg_logical_emit_message": True}),
}


@pytest.mark.parametrize("name", TABLE)
def test_settings_that_are_weaker_than_promised_are_reported(name: str) -> None:
    settings, expected = TABLE[name]
    weaknesses = find_weaknesses(DURABLE._replace(**settings))  # type: ignore[arg-type]
    assert {weakness.setting: weakness.is_severe for weakness in weaknesses} == expected


def test_advice_names_the_writes_that_the_setting_exposes() -> None:
    """Appends are exposed only where they do not set `synchronous_commit` themselves."""
    weak = DURABLE._replace(synchronous_commit="off")
    [raised] = find_weaknesses(weak)
    assert "writes other than appends" in raised.advice
    [of_server] = find_weaknesses(weak, raises_synchronous_commit=False)
    assert "acknowledged messages" in of_server.advice


def test_storage_of_neon_does_not_need_fsync() -> None:
    weak = DURABLE._replace(fsync=False, full_page_writes=False)
    assert find_weaknesses(weak, is_neon=True) == []
