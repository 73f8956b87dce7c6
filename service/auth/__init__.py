"""Caller identity: authenticators, tokens, published keys, and TLS certificates."""
