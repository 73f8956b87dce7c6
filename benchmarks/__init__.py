"""What `make bench` runs: the real server over the wire, and beside it in the same run what it is compared with."""
