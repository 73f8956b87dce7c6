"""Diagnosis for `chat-history check`: properties of the configured database, with advice."""

from service.doctor.connections import Pool
from service.doctor.description import Description, SchemaState, describe
from service.doctor.diagnosis import diagnose
from service.doctor.disk import check_free_space
from service.doctor.findings import Finding, Verdict
from service.doctor.hosts import check_hosts, describe_hosts
from service.doctor.refusals import explain

__all__ = [
    "Description",
    "Finding",
    "Pool",
    "SchemaState",
    "Verdict",
    "check_free_space",
    "check_hosts",
    "describe",
    "describe_hosts",
    "diagnose",
    "explain",
]
