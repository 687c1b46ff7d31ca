"""Device code in Triton: what runs on a GPU, and in Triton's interpreter on a CPU. No launches."""
