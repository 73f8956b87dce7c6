"""`python -m examples.chatbot`: serve the chatbot."""

from __future__ import annotations

from .server import serve

if __name__ == "__main__":
    serve()
