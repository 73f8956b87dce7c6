"""Search by meaning: Qdrant finds, PostgreSQL decides. Nothing here is imported where search is off."""
