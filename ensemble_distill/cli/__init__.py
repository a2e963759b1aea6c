"""The command line: an argument, one call, an exit code. torch is imported inside commands only."""
