"""Reference servers. Each prints its address on a line when it serves, and stops at SIGTERM."""
