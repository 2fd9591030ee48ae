"""Predictive checks: entries left out of held-out observations, and how well they are predicted."""
