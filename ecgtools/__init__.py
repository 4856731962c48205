"""Running the notebooks: the command line, the environment, pairs, exercises and the report."""
