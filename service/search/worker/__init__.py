"""The search process: embedded Qdrant and offline embeddings, outside the event loop."""
