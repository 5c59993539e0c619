"""The dense sweep."""
