"""From a configuration to a finished run: assembling, the loop, resuming, records."""
