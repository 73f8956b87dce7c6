"""The meaning of every SQLSTATE that a client of PostgreSQL 15 to 18 can receive.

SQLSTATEs are those of PostgreSQL's appendix A, and of the poolers and proxies in front of it. A
code has a rule of its own, or that of its class (the first two characters). A code of an unknown
class is a defect. `tests/unit/test_sqlstates.py` walks the lists that PostgreSQL itself installs.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


class Policy(Enum):
    """The treatment of a statement that failed."""

    RETRY = auto()
    """The transaction was rolled back, and may succeed again on the same connection."""
    RECONNECT = auto()
    """The connection cannot be used any more: close it, and try again on another one."""
    OUTAGE = auto()
    """The database cannot do it now: wait with back-off, and try again until the deadline."""
    REFUSE = auto()
    """The same statement fails again until an operator acts: answer the caller immediately."""
    DEFECT = auto()
    """A statement that must not occur: INTERNAL."""


class Failure(Enum):
    """The meaning of a database error for the transaction in which it occurred."""

    CONTENTION = auto()
    """Rolled back because of a concurrent transaction; may succeed again on a fresh snapshot."""
    LOCKED = auto()
    """Rolled back because another transaction held a lock for longer than the lock timeout."""
    LOST = auto()
    """The connection was lost. If COMMIT had been sent, the outcome is unknown."""
    OUTAGE = auto()
    """Nothing was stored: no connection could be opened, none was free in time, or the server
    rejected the statement for a reason that may pass."""
    CANCELLED = auto()
    """The server cancelled the statement: its timeout had passed, or an operator cancelled it."""
    DENIED = auto()
    """The statement cannot run until an operator acts: the role, the schema or damaged files."""
    BAD_DATA = auto()
    """A value that PostgreSQL cannot store, and that validation should have rejected."""
    DEFECT = auto()
    """Any other error: a defect, or a violated constraint that the calling code handles first."""


class Scope(Enum):
    """The work that an error shows to be impossible. Readiness follows it."""

    NOTHING = auto()
    WRITES = auto()
    ALL = auto()


class Rule(NamedTuple):
    """The rule for a SQLSTATE."""

    policy: Policy
    failure: Failure
    scope: Scope = Scope.NOTHING
    cause: str = ""
    """The fault and its remedy, for the log and `check`; empty if no operator needs to act."""


_CONTENTION = Rule(Policy.RETRY, Failure.CONTENTION)
_LOST = Rule(Policy.RECONNECT, Failure.LOST, Scope.ALL)
_STALE = Rule(Policy.RECONNECT, Failure.OUTAGE)
_OUTAGE = Rule(Policy.OUTAGE, Failure.OUTAGE, Scope.ALL)
_DENIED = Rule(Policy.REFUSE, Failure.DENIED, Scope.ALL)
_BAD_DATA = Rule(Policy.REFUSE, Failure.BAD_DATA)
_DEFECT = Rule(Policy.DEFECT, Failure.DEFECT)

_SCHEMA = _DENIED._replace(
    cause="a table, column or function is missing: run `chat-history migrate`, and check the schema"
)
_PREPARED = _STALE._replace(
    cause="a prepared statement is missing, as behind a pooler: "
    "set CHAT_HISTORY_DB_PREPARED_STATEMENTS=off"
)
# Not an outage: damage may concern one row, whose statements must not delay those of other rows.
_DAMAGED = _DENIED._replace(
    cause="PostgreSQL cannot read its files: look at its log, and restore them from a backup"
)
_REJECTED = _OUTAGE._replace(
    cause="the server rejects the role or its password: check user and password in DATABASE_URL, "
    "and pg_hba.conf"
)

UNKNOWN = _DEFECT
"""The rule for a code of a class that PostgreSQL does not define."""

BY_CLASS: dict[str, Rule] = {
    "00": _DEFECT,  # successful_completion
    "01": _DEFECT,  # warning
    "02": _DEFECT,  # no_data
    "03": _DEFECT,  # sql_statement_not_yet_complete
    "08": _LOST,  # connection_exception; PgBouncer reports its own errors as 08P01
    "09": _DEFECT,  # triggered_action_exception
    "0A": _DEFECT,  # feature_not_supported
    "0B": _DEFECT,  # invalid_transaction_initiation
    "0F": _DEFECT,  # locator_exception
    "0L": _DEFECT,  # invalid_grantor
    "0P": _DENIED._replace(cause="a role that the connection string names does not exist"),
    "0Z": _DEFECT,  # diagnostics_exception
    "10": _DEFECT,  # xquery_error
    "20": _DEFECT,  # case_not_found
    "21": _DEFECT,  # cardinality_violation
    "22": _BAD_DATA,  # data_exception
    "23": _DEFECT,  # integrity_constraint_violation: the calling code handles those that may occur
    "24": _DEFECT,  # invalid_cursor_state
    "25": _DEFECT,  # invalid_transaction_state
    "26": _PREPARED,  # invalid_sql_statement_name
    "27": _DEFECT,  # triggered_data_change_violation
    "28": _REJECTED,  # invalid_authorization_specification
    "2B": _DEFECT,  # dependent_privilege_descriptors_still_exist
    "2D": _DEFECT,  # invalid_transaction_termination
    "2F": _DEFECT,  # sql_routine_exception
    "34": _DEFECT,  # invalid_cursor_name
    "38": _DEFECT,  # external_routine_exception
    "39": _DEFECT,  # external_routine_invocation_exception
    "3B": _DEFECT,  # savepoint_exception
    "3D": _OUTAGE._replace(
        cause="the database does not exist: create it, or correct its name in DATABASE_URL"
    ),
    "3F": _SCHEMA,  # invalid_schema_name
    "40": _CONTENTION,  # transaction_rollback
    "42": _DEFECT,  # syntax_error_or_access_rule_violation
    "44": _DEFECT,  # with_check_option_violation
    "53": _OUTAGE._replace(cause="the server lacks resources: look at its log"),
    "54": _DEFECT,  # program_limit_exceeded
    "55": _OUTAGE._replace(
        cause="the server or the database does not accept this in its present state: "
        "look at PostgreSQL's log"
    ),
    "57": _OUTAGE,  # operator_intervention
    "58": _DAMAGED,  # system_error
    "72": _CONTENTION,  # snapshot_too_old, up to version 16
    "F0": _OUTAGE._replace(cause="the server's configuration file has an error"),
    "HV": _DEFECT,  # foreign data wrappers: the schema has no foreign tables
    "P0": _DENIED._replace(
        cause="a trigger or function that is not the service's raised an error: "
        "look at PostgreSQL's log"
    ),
    "XX": _DEFECT,  # internal_error
}

BY_CODE: dict[str, Rule] = {
    # --- Connections. 08000, 08003, 08006, 08007 and 08P01 follow their class.
    "08001": _OUTAGE,  # sqlclient_unable_to_establish_sqlconnection
    "08004": _OUTAGE,  # sqlserver_rejected_establishment_of_sqlconnection
    # --- Transactions.
    "25006": Rule(  # read_only_sql_transaction
        Policy.RECONNECT,
        Failure.OUTAGE,
        Scope.WRITES,
        "the server is read-only, as a standby, or default_transaction_read_only is on: "
        "connect to a writable primary",
    ),
    "25P03": _LOST._replace(  # idle_in_transaction_session_timeout
        cause="idle_in_transaction_session_timeout ended a transaction: raise it for this role"
    ),
    "25P04": _LOST._replace(  # transaction_timeout, from version 17
        cause="transaction_timeout ended a transaction: raise it for this role"
    ),
    "40003": _LOST,  # statement_completion_unknown
    "55P03": Rule(Policy.RETRY, Failure.LOCKED),  # lock_not_available
    "57014": Rule(  # query_canceled
        Policy.RETRY,
        Failure.CANCELLED,
        Scope.ALL,
        "the server cancelled a statement: statement_timeout is too short for this role, or an "
        "operator cancelled it",
    ),
    # --- The role and the schema.
    "42501": _DENIED._replace(  # insufficient_privilege
        cause="the role lacks a privilege: grant SELECT, INSERT, UPDATE and DELETE on all tables, "
        "and migrate as the owner of the schema"
    ),
    "42P01": _SCHEMA,  # undefined_table
    "42703": _SCHEMA,  # undefined_column
    "42883": _SCHEMA,  # undefined_function
    "42704": _SCHEMA,  # undefined_object
    "42804": _SCHEMA,  # datatype_mismatch: the type of a column was changed
    "42809": _SCHEMA,  # wrong_object_type: a view in the place of a table
    "42P10": _SCHEMA,  # invalid_column_reference: no unique index for ON CONFLICT
    "428C9": _SCHEMA,  # generated_always: a column was made a generated one
    "42P05": _PREPARED,  # duplicate_prepared_statement
    # --- Resources.
    "53100": Rule(  # disk_full
        Policy.OUTAGE,
        Failure.OUTAGE,
        Scope.WRITES,
        "the database's disk is full: free or add space",
    ),
    "53200": _OUTAGE._replace(cause="the server is out of memory or of lock slots"),
    "53300": _OUTAGE._replace(  # too_many_connections
        cause="the server or the role has too many connections: lower "
        "CHAT_HISTORY_DB_POOL_SIZE, use a pooler, or raise max_connections or the role's limit"
    ),
    "53400": _OUTAGE._replace(cause="a limit such as temp_file_limit is reached"),
    "54000": _BAD_DATA,  # program_limit_exceeded: a text that is too long for an index
    "54001": _BAD_DATA,  # statement_too_complex: a query that is nested too deeply
    # --- The state of the server.
    "55P04": _DEFECT,  # unsafe_new_enum_value_usage
    "57P01": _LOST,  # admin_shutdown: also how Neon suspends
    "57P02": _LOST,  # crash_shutdown
    "57P03": _OUTAGE,  # cannot_connect_now
    "57P04": _LOST._replace(cause="the database was dropped: create it, and migrate"),
    "57P05": _LOST,  # idle_session_timeout
    "XX001": _DAMAGED,  # data_corrupted
    "XX002": _DAMAGED._replace(cause="an index is damaged: REINDEX it"),  # index_corrupted
}


def rule_of(sqlstate: str) -> Rule:
    """Return the rule for a code."""
    return BY_CODE.get(sqlstate) or BY_CLASS.get(sqlstate[:2], UNKNOWN)
