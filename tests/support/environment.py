"""A plugin of pytest's that comes before everything else (pyproject.toml names it): what must be set before gRPC is imported."""

from __future__ import annotations

import os

# PostgreSQL refuses to run as root and is started as another user, by a fork. gRPC's own handlers of forks break the child while calls
# are under way in the parent.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
