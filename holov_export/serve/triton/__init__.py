"""Models for a Triton Inference Server: what `holov-export triton` writes, and what its Python backend runs."""
