"""Sums over listed rows."""
