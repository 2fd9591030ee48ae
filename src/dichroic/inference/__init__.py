"""Posteriors of sources given observations: evidence, draws, chains, constraints."""
