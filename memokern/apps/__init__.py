"""What is built for people: the command line, experiments, the demo, figures, facts about this
installation."""
