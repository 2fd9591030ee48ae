"""Fit a problem, separate observations, sample priors: what users call first."""
