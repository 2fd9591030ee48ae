"""EM of diffusion models: posterior draws, and score matching on them."""
