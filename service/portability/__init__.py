"""Export and import of users' data as JSON lines."""
