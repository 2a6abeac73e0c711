"""Tensors in, tensors out: grids, codebooks, Hessians, rotations, packing."""
