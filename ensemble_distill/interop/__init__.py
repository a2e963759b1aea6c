"""Other people's libraries, each in a file of its own and an extra."""
