"""The policy table: every RPC has an entry, and no entry is without an RPC."""

from __future__ import annotations

import pytest

from service.auth.authenticators import trust_all
from service.rpc import pipeline
from service.rpc.admission import Admission, StreamAdmission
from service.rpc.byte_budget import ByteBudget
from service.rpc.method_policies import POLICIES, Access, AuditRule
from service.rpc.servicer import DESCRIPTOR, ChatHistoryServicer

RPCS = {method.name for method in DESCRIPTOR.methods}


def test_every_rpc_has_a_policy() -> None:
    assert set(POLICIES) == RPCS


async def test_building_the_pipeline_fails_for_an_rpc_without_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    incomplete = {name: policy for name, policy in POLICIES.items() if name != "GetSession"}
    monkeypatch.setattr(pipeline, "POLICIES", incomplete)
    built = pipeline.Pipeline(
        trust_all, Admission(1), StreamAdmission(1, 1), ByteBudget(1, 1, 1), call_timeout_s=1.0
    )
    with pytest.raises(KeyError, match="GetSession"):
        built.handlers(DESCRIPTOR, ChatHistoryServicer)


def test_every_deletion_and_every_export_is_audited() -> None:
    always = {
        name: policy.audit for name, policy in POLICIES.items() if policy.audit is not AuditRule.ACT
    }
    assert always == {
        name: AuditRule.EXPORT if name == "ExportUserData" else AuditRule.ERASE
        for name in RPCS
        if name.startswith(("Delete", "Export"))
    }


def test_only_rpcs_on_all_users_are_for_services_only() -> None:
    service_only = {
        name for name, policy in POLICIES.items() if policy.access is Access.SERVICE_ONLY
    }
    assert service_only == {"CreateUser", "ListUsers", "DeleteUser", "RebuildSearchIndex"}


def test_every_rpc_that_changes_data_is_a_write() -> None:
    reads = ("Get", "List", "Search", "Watch", "Export")
    assert {name for name, policy in POLICIES.items() if not policy.is_write} == {
        name for name in RPCS if name.startswith(reads)
    }
