"""A plugin of pytest's that comes before everything else (pyproject.toml names it): what must be set before gRPC is imported.

And what the programs that the tests start shall inherit.
"""

from __future__ import annotations

import os
import signal
import tempfile

# PostgreSQL refuses to run as root and is started as another user, by a fork. gRPC's own handlers of forks break the child while calls
# are under way in the parent.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# A shell ignores SIGINT on behalf of what it starts in the background, and so would every program that the tests start and stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What the tests call is on this machine; gRPC would ask a proxy even for that.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1,localhost,::1")))

# The path of a socket has room for 107 bytes; that of a folder for temporary files may be as long as that by itself.
if len(tempfile.gettempdir()) > 40:
    os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
