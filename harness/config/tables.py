"""The tables and findings that a sweep file states, checked against its evaluations."""

from __future__ import annotations

from harness.core.sweep import Finding, Term


def place_of_term(term: Term, finding: Finding) -> tuple[str, str]:
    """The table and the column that a term of a finding speaks of."""
    return term.table or finding.table, term.column or finding.column
