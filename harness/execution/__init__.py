"""Carrying a plan out: the driver, the scheduler, executors, workers. The one importer of Ray."""
