"""Place of the Triton kernels of the masked operations. Nothing is implemented here yet."""
