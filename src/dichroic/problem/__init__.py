"""What is separated: observations, sources, views; their validation, and what can be learned from them."""
