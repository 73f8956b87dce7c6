"""Semantic search: Qdrant finds, PostgreSQL decides. Without search nothing of it is imported."""
