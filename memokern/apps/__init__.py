"""What is built for people: command line, experiments, demo, figures."""
