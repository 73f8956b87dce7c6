"""The append path: batches concurrent appends into shared statements (group commit)."""
