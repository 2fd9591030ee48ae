"""Methods to compare with, problems whose answers are known, and what compares them."""
