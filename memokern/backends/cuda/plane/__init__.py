"""The dense sweep over rows of few features, of many queries."""
