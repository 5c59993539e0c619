"""The dense sweep over wide rows: a plan, and the launches."""
