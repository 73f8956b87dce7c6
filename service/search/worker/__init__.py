"""The worker process of search: embedded Qdrant and offline embeddings, outside the event loop."""
