"""The embedded PostgreSQL that serves when no database is configured."""
