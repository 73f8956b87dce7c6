"""PostgreSQL: all code that uses SQLAlchemy.

The modules of the nouns (users, sessions, messages, documents) name their functions alike: `get`
raises NotFound, `find` returns None, `create`, `list_page`, `update`, `delete`, and `delete_slice`
for deletes that are too large for one transaction. Functions that take a connection run in its
transaction and never commit.
"""
