"""The index of a training set: what certified pruning knows of the rows."""
