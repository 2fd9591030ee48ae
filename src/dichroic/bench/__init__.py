"""Methods compared on problems whose truth is known."""
