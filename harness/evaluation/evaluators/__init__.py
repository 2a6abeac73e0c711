"""One file per evaluator, found by name."""
