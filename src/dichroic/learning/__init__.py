"""Expectation-maximisation: learn the prior of every source from mixtures alone."""
