"""Caller identity: tokens, published keys, certificates, and which user a caller may act for."""
