"""The plan of a sweep: which cells are done, missing or refused and why, the passes to run, and estimates of their cost."""
