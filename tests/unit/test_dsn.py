"""Connection strings: every form that Neon's console and others print, and no leaked password."""

from __future__ import annotations

import ssl
import traceback
from pathlib import Path

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import dialect

from service.config import BadConfiguration
from service.store.db.addresses import Address
from service.store.db.dsn import Route, Target, parse
from service.store.db.read_target import read_target
from tests.support.servers import settings

SECRET = "npg_s3cret"
POOLED = "ep-cool-sun-a1b2c3-pooler.eu-central-1.aws.neon.tech"
DIRECT = "ep-cool-sun-a1b2c3.eu-central-1.aws.neon.tech"


def neon(host: str, query: str = "?sslmode=require&channel_binding=require") -> str:
    return f"postgresql://neondb_owner:{SECRET}@{host}/neondb{query}"


def connection(target: Target) -> dict[str, object]:
    """Return the keyword arguments of the driver."""
    driver: dict[str, object] = dialect().create_connect_args(target.url)[1]  # type: ignore[no-untyped-call]
    return driver | target.connect_args


def tls_context(target: Target) -> ssl.SSLContext:
    tls = target.connect_args["ssl"]
    assert isinstance(tls, ssl.SSLContext)
    return tls


@pytest.mark.parametrize(
    "text",
    [
        neon(POOLED),
        f"'{neon(POOLED)}'",
        f'"{neon(POOLED)}"',
        f"psql '{neon(POOLED)}'",
        f"psql {neon(POOLED)}\n",
        f"  {neon(POOLED)}  ",
        neon(POOLED).replace("postgresql://", "postgres://"),
        neon(POOLED).replace("postgresql://", "postgresql+psycopg://"),
        neon(POOLED, "?sslmode=require"),
        neon(POOLED, ""),
        neon(POOLED, "?pgbouncer=true&connect_timeout=10&sslmode=require"),
        neon(POOLED, "?options=endpoint%3Dep-cool-sun-a1b2c3&sslmode=require"),
        f"postgresql://{POOLED}/?user=neondb_owner&password={SECRET}&dbname=neondb&sslmode=require",
    ],
)
def test_every_form_of_neons_pooled_string_gives_the_same_target(text: str) -> None:
    target = parse(text)
    driver = connection(target)
    assert (driver["host"], driver["user"], driver["password"], driver["database"]) == (
        POOLED,
        "neondb_owner",
        SECRET,
        "neondb",
    )
    assert driver.keys() <= {
        "host", "user", "password", "database", "ssl", "server_settings", "timeout",
        "statement_cache_size", "prepared_statement_cache_size",
    }  # fmt: skip
    assert target.is_pooled
    assert not target.prepared_statements
    assert driver["prepared_statement_cache_size"] == 0
    assert driver["server_settings"] == {
        "application_name": "chat-history",
        "client_encoding": "UTF8",
    }
    assert tls_context(target).check_hostname
    assert tls_context(target).verify_mode is ssl.CERT_REQUIRED
    assert "not supported" not in " ".join(target.notes)
    assert target.location == f"{POOLED}/neondb"


def test_direct_neon_string_prepares_statements() -> None:
    target = parse(neon(DIRECT))
    assert not target.is_pooled
    assert target.prepared_statements
    assert tls_context(target).check_hostname
    assert target.direct() is target


def test_direct_target_differs_from_the_pooled_one_in_the_host_only() -> None:
    target = parse(neon(POOLED, "?sslmode=verify-full&connect_timeout=7&application_name=mine"))
    direct = target.direct()
    assert direct.url == target.url.set(host=DIRECT)
    assert not direct.is_pooled
    assert direct.connect_args == target.connect_args
    assert direct.ssl_mode == "verify-full"
    assert direct.connect_args["timeout"] == 7
    assert direct.connect_args["server_settings"]["application_name"] == "mine"


def test_required_channel_binding_is_noted_as_unsupported() -> None:
    assert any("SCRAM-SHA-256-PLUS" in note for note in parse(neon(DIRECT)).notes)
    assert parse(neon(DIRECT, "?channel_binding=prefer")).notes == ()


@pytest.mark.parametrize(
    ("text", "prepared", "pooled"),
    [
        ("postgresql://u@db.internal/d?pgbouncer=true", "auto", True),
        ("postgresql://u@db.internal/d", "off", True),
        # Whatever the host and the port may mean, the behaviour of the connection decides.
        ("postgresql://u@db.internal/d", "auto", False),
        ("postgresql://u@db.internal:6432/d", "auto", False),
        ("postgresql://u@/d?host=db.internal&port=6432", "auto", False),
        ("postgresql://u@aws-0-eu.pooler.supabase.com:6543/d", "auto", False),
        ("postgresql://u@h1:5432,h2:6432/d", "auto", False),
    ],
)
def test_configuration_may_declare_a_pooler_and_names_do_not(
    text: str, prepared: str, pooled: bool
) -> None:
    target = parse(text, prepared_statements=prepared)
    assert target.route is (Route.TRANSACTION if pooled else None)
    assert target.prepared_statements is not pooled
    assert target.direct() is target


def test_found_pooler_changes_the_arguments_of_connections() -> None:
    target = parse("postgresql://u@db.internal/d")
    direct = target.with_route(Route.DIRECT, "")
    assert direct.prepared_statements
    assert direct.connect_args == target.connect_args
    session = target.with_route(Route.SESSION, "")
    assert session.prepared_statements
    assert session.connect_args["server_settings"]["client_encoding"] == "UTF8"
    pooled = target.with_route(Route.TRANSACTION, "")
    assert pooled.is_pooled
    assert not pooled.prepared_statements
    assert pooled.connect_args["statement_cache_size"] == 0
    assert pooled.connect_args["prepared_statement_cache_size"] == 0


def test_setting_prepares_statements_through_a_found_pooler() -> None:
    target = parse("postgresql://u@db.internal/d", prepared_statements="on")
    assert target.with_route(Route.TRANSACTION, "").prepared_statements


def test_options_are_lost_through_a_found_transaction_pooler_only() -> None:
    target = parse("postgresql://u@db.internal/d?options=-c%20statement_timeout%3D5s")
    for route in (Route.DIRECT, Route.SESSION):
        settings = target.with_route(route, "").connect_args["server_settings"]
        assert settings["statement_timeout"] == "5s"
    with pytest.raises(ValueError, match=r"statement_timeout .* ALTER ROLE"):
        target.with_route(Route.TRANSACTION, "")


def test_pooler_with_prepared_statements_is_still_pooled() -> None:
    target = parse(neon(POOLED), prepared_statements="on")
    assert target.is_pooled
    assert target.prepared_statements


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("disable", False), ("allow", "allow"), ("prefer", "prefer"), (None, "prefer")],
)
def test_ssl_modes_without_verification_are_passed_to_the_driver(
    mode: str | None, expected: object
) -> None:
    target = parse("postgresql://u@db.internal/d" + (f"?sslmode={mode}" if mode else ""))
    assert target.connect_args["ssl"] == expected
    assert target.ssl_mode == (mode or "prefer")


@pytest.mark.parametrize(
    ("mode", "verify", "check_hostname"),
    [
        ("require", ssl.CERT_NONE, False),
        ("verify-ca", ssl.CERT_REQUIRED, False),
        ("verify-full", ssl.CERT_REQUIRED, True),
    ],
)
def test_ssl_modes_verify_as_libpq_does(
    mode: str, verify: ssl.VerifyMode, check_hostname: bool
) -> None:
    tls = tls_context(parse(f"postgresql://u@db.internal/d?sslmode={mode}"))
    assert (tls.verify_mode, tls.check_hostname) == (verify, check_hostname)


def test_require_with_a_root_certificate_verifies_the_chain() -> None:
    root = ssl.get_default_verify_paths().cafile or "system"
    tls = tls_context(parse(f"postgresql://u@db.internal/d?sslmode=require&sslrootcert={root}"))
    assert (tls.verify_mode, tls.check_hostname) == (ssl.CERT_REQUIRED, False)
    tls = tls_context(parse("postgresql://u@db.internal/d?sslmode=verify-full&sslrootcert=system"))
    assert tls.check_hostname


def test_unix_socket_uses_no_tls() -> None:
    target = parse("postgresql://postgres@/postgres?host=/run/some%20where&sslmode=require")
    assert connection(target)["host"] == "/run/some where"
    assert target.connect_args["ssl"] is False
    assert target.location == "the socket in /run/some where"


SEARCH_PATHS = [
    "options=-c%20search_path%3Dchat",
    "options=-csearch_path=chat",
    "options=--search_path=chat",
    "options=--search-path=chat",
    "options=endpoint%3Dep-x%20-c%20search_path%3Dchat",
    "search_path=chat",
    "search_path=%22chat%22",
]


@pytest.mark.parametrize("query", SEARCH_PATHS)
@pytest.mark.parametrize("port", [5432, 6432], ids=["direct", "pooled"])
def test_search_path_names_the_schema_and_is_not_sent(query: str, port: int) -> None:
    target = parse(f"postgresql://u@db.internal:{port}/d?{query}")
    assert target.schema == "chat"
    assert "search_path" not in target.connect_args["server_settings"]
    assert target.notes == ()
    assert parse(f"postgresql://u@db.internal/d?{query}", schema="chat").schema == "chat"
    with pytest.raises(ValueError, match="CHAT_HISTORY_DB_SCHEMA"):
        parse(f"postgresql://u@db.internal/d?{query}", schema="other")


def test_schema_is_found_by_its_columns_unless_one_is_named() -> None:
    assert parse("postgresql://u@h/d").schema is None
    assert parse("postgresql://u@h/d?search_path=%22%24user%22,%20public").schema is None
    assert parse("postgresql://u@h/d?search_path=%22%24user%22,public", schema="a").schema == "a"
    assert parse("postgresql://u@h/d", schema="chat").schema == "chat"
    assert parse("postgresql://u@h/d?search_path=public").schema == "public"


def test_startup_options_are_sent_on_direct_connections() -> None:
    target = parse("postgresql://u@h/d?options=-c%20work_mem%3D8MB%20--jit%3Doff")
    assert target.connect_args["server_settings"] == {
        "application_name": "chat-history",
        "work_mem": "8MB",
        "jit": "off",
    }


@pytest.mark.case(n=512)
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("pgbouncer=true&options=-cstatement_timeout%3D5s", "statement_timeout in the options"),
        ("search_path=one,two", "several schemas"),
        ("options=-d5", "-c name=value"),
        ("schema=chat", "schema in the database URL is not supported"),
        ("require_auth=scram-sha-256&sslcrl=x", "require_auth, sslcrl in the database URL"),
    ],
)
def test_option_that_cannot_be_honoured_is_an_error(query: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(f"postgresql://u@h/d?{query}")


def test_option_without_effect_is_noted_without_its_value() -> None:
    target = parse(f"postgresql://u@h/d?sslpassword={SECRET}&gssencmode=disable")
    assert [note.split()[0] for note in target.notes] == ["gssencmode", "sslpassword"]
    assert SECRET not in str(target.notes)
    assert connection(target).keys().isdisjoint({"sslpassword", "gssencmode"})


def test_password_with_escaped_characters_is_decoded() -> None:
    target = parse("postgresql://us%40er:p%40s%2Fs%3Aw%25%23%3F%20@h:5433/d")
    driver = connection(target)
    assert (driver["user"], driver["password"], driver["port"]) == ("us@er", "p@s/s:w%#? ", 5433)


@pytest.mark.parametrize(
    "text",
    [
        "",
        SECRET,
        f"host=h user=u password={SECRET} x",
        f"host=h user=u password='{SECRET}",
        f"jdbc:postgresql://h/d?user=u&password={SECRET}",
        f"mysql://u:{SECRET}@h/d",
        f"postgresql://u:{SECRET}@h:port/d",
        f"postgresql://u:x@{SECRET}:y@h/d",
        f"postgresql://u:x@{SECRET}@h/d",
        f"postgresql://u:{SECRET}@h1:5432,h2:port/d",
        f"postgresql://u:{SECRET}@h1,h2/d?port=1,2,3",
        f"postgresql://u:{SECRET}@h1:0/d",
        f"postgresql://u:{SECRET}@h1:65536/d",
        f"postgresql://u:{SECRET}@h:1:2/d",
        f"postgresql://u:{SECRET}@[::1/d",
        f"postgresql://u:{SECRET}@[::1]5432/d",
        f"postgresql://u:{SECRET}@h1,h2/d?target_session_attrs={SECRET}",
        f"postgresql://u:{SECRET}@h/d?sslmode={SECRET}",
        f"postgresql://u:{SECRET}@h/d?connect_timeout={SECRET}",
        f"postgresql://u:{SECRET}@/d?host=h&port={SECRET}",
        f"postgresql://u:{SECRET}@h/d?sslmode=verify-full&sslrootcert=/nowhere/{SECRET}",
        f"postgresql://u:{SECRET}@h/d?sslmode=require&sslcert=/nowhere/{SECRET}",
    ],
)
def test_error_of_a_bad_string_contains_no_secret(text: str) -> None:
    with pytest.raises(ValueError, match="database URL") as refused:
        parse(text)
    assert SECRET not in "".join(traceback.format_exception(refused.value))
    assert "\n" not in str(refused.value)


def test_repr_contains_no_password(tmp_path: Path) -> None:
    target = parse(neon(POOLED))
    assert (
        SECRET
        not in f"{target!r} {target.url!r} {target.location} {target.notes} {target.direct()!r}"
    )


# --- Several hosts.

TWO = (Address("h1", 5433), Address("h2", 5432))


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://u:{SECRET}@h1:5433,h2:5432/d",
        f"postgresql://u:{SECRET}@h1:5433,h2/d",
        f"psql 'postgresql://u:{SECRET}@h1:5433,h2/d'",
        f"postgresql://u:{SECRET}@/d?host=h1,h2&port=5433,5432",
        f"postgresql://u:{SECRET}@/d?host=h1&host=h2&port=5433&port=5432",
        f"postgresql://u:{SECRET}@/d?host=h1:5433&host=h2:5432",
        f"postgresql://u:{SECRET}@/d?host=h1:5433,h2",
        f"postgresql://u:{SECRET}@h1,h2/d?port=5433,5432",
        f"postgresql://u:{SECRET}@h1,h2/d?port=5433,",
        f"postgresql://h1:5433,h2:5432/d?user=u&password={SECRET}",
        f"host=h1,h2 port=5433,5432 user=u password={SECRET} dbname=d",
        f"host = 'h1,h2' port='5433,5432'\nuser=u password='{SECRET}' dbname=d",
    ],
)
def test_several_hosts_are_accepted_in_every_form(text: str) -> None:
    target = parse(text)
    assert target.addresses == TWO
    assert target.location == "h1:5433,h2:5432/d"
    driver = connection(target)
    assert (driver["host"], driver["port"], driver["user"]) == ("h1", 5433, "u")
    assert (driver["password"], driver["database"]) == (SECRET, "d")
    assert target.notes == ()
    assert not target.is_pooled
    assert target.connect_args["ssl"] == "prefer"


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("postgresql://u@[::1]:5433,h2/d", (Address("::1", 5433), Address("h2", 5432))),
        ("postgresql://u@[::1],h2/d?port=6000", (Address("::1", 6000), Address("h2", 6000))),
        ("postgresql://u@h1:5433,h2:5434/d?port=6000", (Address("h1", 6000), Address("h2", 6000))),
        ("host=::1,h2 user=u", (Address("::1", 5432), Address("h2", 5432))),
        ("host=,h2 user=u", (Address("localhost", 5432), Address("h2", 5432))),
        ("postgresql://u@%2Frun%2Fa,h2/d", (Address("/run/a", 5432), Address("h2", 5432))),
        ("postgresql://u@%2Frun%2Fa:5433/d", (Address("/run/a", 5433),)),
        (
            "hostaddr=10.0.0.1,10.0.0.2 user=u",
            (Address("10.0.0.1", 5432), Address("10.0.0.2", 5432)),
        ),
        ("user=u dbname=d", ()),
        ("postgresql:///d?port=5433", ()),
    ],
)
def test_addresses_are_those_of_libpq(text: str, addresses: tuple[Address, ...]) -> None:
    assert parse(text).addresses == addresses


def test_text_of_an_ipv6_address_has_brackets() -> None:
    assert str(Address("::1", 6000)) == "[::1]:6000"
    assert parse("postgresql://u@[::1]:6000/d").url.host == "::1"


def test_socket_in_the_url_is_a_socket() -> None:
    target = parse("postgresql://u@%2Frun%2Fa:5433/d")
    driver = connection(target)
    assert (driver["host"], driver["port"]) == ("/run/a", 5433)
    assert target.connect_args["ssl"] is False
    assert target.location == "the socket in /run/a"
    assert connection(parse("postgresql:///d?port=5433"))["port"] == 5433


def test_quoted_values_of_the_other_form_are_decoded() -> None:
    driver = connection(parse(r"host=h user='a b' password='it\'s \\' dbname=d"))
    assert (driver["user"], driver["password"]) == ("a b", "it's \\")
    assert connection(parse("host=h user=u password=it's"))["password"] == "it's"


def test_several_neon_hosts_are_verified_and_migrated_directly() -> None:
    other = POOLED.replace("ep-cool", "ep-warm")
    target = parse(f"postgresql://u:{SECRET}@{POOLED},{other}/d")
    assert target.is_neon
    assert target.is_pooled
    assert tls_context(target).check_hostname
    direct = target.direct()
    assert [address.host for address in direct.addresses] == [
        DIRECT,
        DIRECT.replace("ep-cool", "ep-warm"),
    ]
    assert direct.url.host == DIRECT


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "prefer-read-write"),
        ("any", "prefer-read-write"),
        ("read-write", "read-write"),
        ("primary", "primary"),
    ],
)
def test_session_attributes_that_a_primary_has_are_accepted(
    value: str | None, expected: str
) -> None:
    option = f"?target_session_attrs={value}" if value else ""
    target = parse(f"postgresql://u@h1,h2/d{option}")
    assert target.session_attrs == expected
    assert target.notes == ()


@pytest.mark.parametrize("value", ["standby", "prefer-standby", "read-only", SECRET])
def test_other_session_attributes_are_rejected(value: str) -> None:
    with pytest.raises(ValueError, match=r"target_session_attrs.* in the database URL is not"):
        parse(f"postgresql://u@h1,h2/d?target_session_attrs={value}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "prefer-standby"),
        ("any", "prefer-standby"),
        ("prefer-standby", "prefer-standby"),
        ("standby", "standby"),
        ("read-only", "standby"),
    ],
)
def test_session_attributes_that_a_replica_has_are_accepted(
    value: str | None, expected: str
) -> None:
    option = f"?target_session_attrs={value}" if value else ""
    target = parse(f"postgresql://u@h1,h2/d{option}", is_replica=True)
    assert target.session_attrs == expected
    assert target.is_replica
    assert not parse("postgresql://u@h1,h2/d").is_replica


@pytest.mark.parametrize("value", ["read-write", "primary", SECRET])
def test_session_attributes_that_no_replica_has_are_rejected(value: str) -> None:
    with pytest.raises(ValueError, match=r"target_session_attrs.* in the database URL is not"):
        parse(f"postgresql://u@h1,h2/d?target_session_attrs={value}", is_replica=True)


def test_replica_is_named_by_a_setting_of_its_own() -> None:
    configured = settings(DATABASE_READ_URL="postgresql://u@replica/d", db_schema="chat")
    target = read_target(configured)
    assert target is not None
    assert (target.location, target.schema, target.is_replica) == ("replica/d", "chat", True)
    assert read_target(settings()) is None


def test_malformed_connection_string_of_the_replica_names_its_setting() -> None:
    with pytest.raises(BadConfiguration) as caught:
        read_target(settings(DATABASE_READ_URL=f"mysql://u:{SECRET}@h/d"))
    [problem] = caught.value.problems
    assert problem.startswith("DATABASE_READ_URL: ")
    assert SECRET not in problem
