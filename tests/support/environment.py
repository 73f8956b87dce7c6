"""A plugin of pytest's that comes before everything else (pyproject.toml names it): what must be set before gRPC is imported.

And what the programs that the tests start shall inherit.
"""

from __future__ import annotations

import os
import signal

# PostgreSQL refuses to run as root and is started as another user, by a fork. gRPC's own handlers of forks break the child while calls
# are under way in the parent.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# A shell ignores SIGINT on behalf of what it starts in the background, and so would every program that the tests start and stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
