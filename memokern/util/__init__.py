"""What stands below everything else: environment variables, checks of plain arguments."""
