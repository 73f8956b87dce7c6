"""The schema: its version and its migrations."""
