"""Arms of the study: what is computed and kept as a run."""
