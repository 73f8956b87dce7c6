"""Diagnosis for `chat-history check`: properties of the configured database, with advice."""

from service.doctor.connections import Pool
from service.doctor.description import Description, describe
from service.doctor.diagnosis import diagnose
from service.doctor.findings import Finding, Verdict
from service.doctor.refusals import explain

__all__ = ["Description", "Finding", "Pool", "Verdict", "describe", "diagnose", "explain"]
