"""Rows from documentation, code and conversations that a team has."""
