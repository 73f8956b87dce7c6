"""The processes that are measured. Each prints its address on a line of its own when it serves, and ends at SIGTERM."""
