"""A quantized model that runs: linears, activations, KV cache, placement on devices."""
