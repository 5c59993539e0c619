"""How a call is answered: by a dense sweep, over a proven list of rows, or by a shorter way."""
