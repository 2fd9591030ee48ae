"""Problems to try things on; nothing else in the package knows about them."""
