"""The attacks of `make hostile`: repeatable, of every kind, on every RPC and field."""

from __future__ import annotations

import random

import pytest
from chathistory.v1.chat_history_service_pb2 import DESCRIPTOR
from google.protobuf.message_factory import GetMessageClass

from benchmarks.hostile import matrix
from benchmarks.hostile.account import Account
from benchmarks.hostile.attacks import MATRIX, Attack, attacks
from benchmarks.hostile.specials import SPECIALS

RPCS = {method.name for method in DESCRIPTOR.services_by_name["ChatHistoryService"].methods}
ID = "0192d0c8-7a5b-7000-8000-000000000001"
ACCOUNT = Account(
    "127.0.0.1:1", ID, "token", "token", dict.fromkeys(("short", "long", "scratch"), ID), ID, ID
)


def test_every_rpc_has_a_base_request() -> None:
    assert set(matrix.BASE_REQUESTS) == RPCS


def test_same_seed_draws_the_same_attacks() -> None:
    assert attacks(7, 100) == attacks(7, 100)
    assert attacks(7, 100) != attacks(8, 100)


def test_300_attacks_are_of_every_kind_and_on_every_rpc() -> None:
    drawn = attacks(1, 300)
    assert len(drawn) == 300
    assert {attack.kind for attack in drawn} == {
        MATRIX,
        *(name for name, special in SPECIALS.items() if special.is_default),
    }
    in_matrix = [attack for attack in drawn if attack.kind == MATRIX]
    assert {attack.parameters["rpc"] for attack in in_matrix} == RPCS
    assert {attack.parameters["size"] for attack in in_matrix} == set(matrix.SIZES)


def test_attacks_with_search_come_first() -> None:
    flags = [attack.needs_search for attack in attacks(1, 300)]
    assert flags == sorted(flags, reverse=True)
    assert set(flags) == {False, True}


def test_only_draws_the_named_kinds() -> None:
    drawn = attacks(1, 10, only=["resets"])
    assert {attack.kind for attack in drawn} == {"resets"}
    with pytest.raises(ValueError, match="no such kind"):
        attacks(1, 10, only=["no such kind"])


def test_attack_survives_serialisation() -> None:
    [attack] = attacks(3, 1)
    assert Attack.from_json(attack.to_json()) == attack


def test_fields_include_texts_lists_and_objects_at_any_depth() -> None:
    paths = {".".join(field.path) for field in matrix.fields("AppendMessages")}
    assert {
        "messages",
        "messages.content",
        "messages.metadata",
        "messages.parts",
        "messages.parts.data",
        "messages.parts.tool_call.arguments",
        "session.summary",
    } <= paths
    assert "messages.seq" not in paths


@pytest.mark.parametrize("rpc", sorted(RPCS))
def test_requests_grow_with_the_size_of_each_field(rpc: str) -> None:
    kind = GetMessageClass(matrix.SERVICE.methods_by_name[rpc].input_type)
    for field in matrix.fields(rpc):
        sizes = []
        for size in ("0", "limit"):
            body = matrix.request(
                field,
                ACCOUNT,
                size=size,
                text="emoji",
                shape="many small",
                chance=random.Random(1),
            )
            sizes.append(kind.FromString(body).ByteSize())
        assert sizes[0] < sizes[1], field


def test_sizes_follow_the_limit_of_the_field() -> None:
    field = matrix.Field("SearchMessages", ("query",))
    lengths = {
        size: len(
            matrix.message_of(
                field, ACCOUNT, size=size, text="ascii", shape="few big", chance=random.Random(1)
            ).query
        )
        for size in matrix.SIZES
    }
    assert lengths == {
        "0": 0,
        "1": 1,
        "limit-1": 8191,
        "limit": 8192,
        "limit+1": 8193,
        "10x": 81920,
    }
