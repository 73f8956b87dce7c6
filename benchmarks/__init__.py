"""Benchmarks (`make bench`): the service over the wire, and reference servers in the same run."""

import os

# Servers and PostgreSQL are started by fork; gRPC's fork handlers can hang the child at its start.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
