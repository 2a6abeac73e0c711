"""The walk over a model's blocks, one block on the device at a time."""
