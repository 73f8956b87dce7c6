"""The search outbox: pending index changes, what to index, and the state of a rebuild."""
