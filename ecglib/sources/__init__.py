"""Where records come from: each module reads one source and returns `ecglib.records.Records`."""
