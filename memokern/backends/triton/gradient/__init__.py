"""The gradients of the dense sweep."""
