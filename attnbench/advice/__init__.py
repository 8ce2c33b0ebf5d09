"""Answers from measurements: each file one question, asked of records or of a short sweep."""
