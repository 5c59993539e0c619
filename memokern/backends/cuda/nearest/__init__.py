"""The nearest rows."""
