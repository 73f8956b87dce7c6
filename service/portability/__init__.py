"""Export and import of user data."""
