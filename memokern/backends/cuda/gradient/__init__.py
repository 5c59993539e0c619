"""The gradients of the dense sweep for its queries."""
