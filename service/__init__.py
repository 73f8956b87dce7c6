"""ChatHistory: a gRPC service that keeps conversations on PostgreSQL."""

__version__ = "0.1.0"
