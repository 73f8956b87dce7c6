"""Turns libpq's options for TLS into the argument of the driver."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def take_tls_options(
    mode: str, hosts: Sequence[str], query: dict[str, str], *, is_neon: bool
) -> ssl.SSLContext | str | bool:
    """Return the `ssl` argument of connections for libpq's options, which leave the query.

    Raises:
        ValueError: the mode is unknown, or a certificate file cannot be read.
    """
    if mode not in _SSL_MODES:
        raise ValueError(f"sslmode in the database URL is not one of {', '.join(_SSL_MODES)}")
    if all(host.startswith("/") for host in hosts) or mode == "disable":
        return False
    if mode in ("allow", "prefer"):
        return mode
    root = query.pop("sslrootcert", None)
    is_verified = mode in ("verify-ca", "verify-full") or root is not None or is_neon
    try:
        context = ssl.create_default_context(cafile=None if root == "system" else root)
        if "sslcert" in query:
            context.load_cert_chain(
                query.pop("sslcert"), query.pop("sslkey", None), query.pop("sslpassword", None)
            )
    except OSError as error:
        raise ValueError(
            f"a certificate file of the database URL cannot be read: {error.strerror}"
        ) from None
    # libpq's `require` does not verify the certificate unless there is a root certificate. Neon's
    # certificates are always public ones, so there they are verified.
    context.check_hostname = (
        is_verified and mode != "verify-ca" and (mode == "verify-full" or is_neon)
    )
    if not is_verified:
        context.verify_mode = ssl.CERT_NONE
    return context


def note_channel_binding(mode: str, query: dict[str, str], *, is_neon: bool) -> str | None:
    """Remove the option for channel binding from the query; return a note if it is required."""
    if query.pop("channel_binding", "") != "require":
        return None
    if is_neon or mode == "verify-full":
        return (
            "channel_binding=require: the driver has no SCRAM-SHA-256-PLUS; the server is "
            "authenticated by its TLS certificate instead"
        )
    return (
        "channel_binding=require is not supported and ignored: set sslmode=verify-full to "
        "authenticate the server"
    )
