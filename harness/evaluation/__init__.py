"""Scorers of a ready model: one file per evaluator; `protocols` says what they are given and return."""
