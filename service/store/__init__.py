"""PostgreSQL: every statement on the tables, and access to the database.

The modules of the resources (users, sessions, messages, documents) name their functions alike:
`get` raises NotFound, `find` returns None, `create`, `list_page`, `update` and `delete`. Deletes
that are too large for one transaction begin with those of `slices`.

How a function reaches the database follows from its first parameter:

- `connection`: it runs in the caller's transaction and never commits. RPC handlers call it through
  `Database.read` or `Database.write`, which retry it.
- `reads` (a ReadBatcher): a read that the driver runs directly, possibly in one statement with
  reads of the same kind. It is retried until its `deadline`.

Background work belongs to objects that are created with a `Database` (Outbox, IndexSource,
ReindexState, WatchHub, EpochKeeper). They send each statement once, and the worker decides on
retries.
"""
