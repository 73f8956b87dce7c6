"""Logs, the audit trail and metrics. A leaf: imports no other package of the service."""
