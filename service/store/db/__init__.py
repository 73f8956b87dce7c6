"""Access to PostgreSQL: pools, retries, read batching, error classification, connection strings."""
