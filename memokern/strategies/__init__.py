"""How a call is answered: densely, from a proven list of rows, or by the short way of small calls."""
