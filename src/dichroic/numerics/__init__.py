"""Arrays and linear algebra that know nothing of sources."""
