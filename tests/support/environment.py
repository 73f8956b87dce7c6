"""Plugin that sets up the environment before gRPC is imported and before tests start programs.

pyproject.toml names it with `-p`, so that pytest imports it before any conftest.py.
"""

from __future__ import annotations

import os
import signal
import tempfile

# PostgreSQL refuses to run as root, so it is started as another user, by a fork. gRPC's fork
# handlers break the child if calls are in flight in the parent.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Programs that a shell starts in the background ignore SIGINT, and their children inherit that.
# The tests stop programs by SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

# All servers of the tests are on this machine, but gRPC would use a proxy even for them.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1,localhost,::1")))

# The path of a Unix socket is limited to 107 bytes, which a long TMPDIR alone may use up.
if len(tempfile.gettempdir()) > 40:
    os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
