"""EM of mixtures of Gaussians: statistics, and the step they give."""
