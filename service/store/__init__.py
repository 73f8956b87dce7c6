"""PostgreSQL: everything that knows SQLAlchemy. Functions take a connection and plain arguments, return rows, never commit."""
