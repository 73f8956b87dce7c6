"""What `make bench` runs: the real server over the wire, and beside it in the same run what it is compared with."""

import os

# The servers and PostgreSQL are started by fork, and gRPC's handlers of it can leave the child hanging before it runs anything.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
