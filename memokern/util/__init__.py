"""What stands below everything else: environment variables, checks of plain arguments, writing of
files, and what PyTorch keeps for itself."""
