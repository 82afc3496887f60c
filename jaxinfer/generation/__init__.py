"""Generation: sampling parameters, sampling, text, the KV cache's blocks, scheduling, and the loop over them."""
