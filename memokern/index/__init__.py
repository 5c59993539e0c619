"""The index of a training set: what certified pruning knows about the rows."""
