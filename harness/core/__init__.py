"""The words that every part shares: cells and keys, sweeps, events, errors, plugins, labels, units. Imports nothing else of ours."""
