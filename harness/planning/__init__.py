"""The plan of a sweep: checks, passes, estimates."""
