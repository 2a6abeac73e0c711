"""The words that every part shares: cells, keys, sweeps, events, errors, plugins, units. Imports nothing else of ours."""
