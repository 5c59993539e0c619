"""Which rows can matter to a query."""
