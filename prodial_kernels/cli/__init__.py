"""The ``prodial`` command line: what is typed, read into the configuration of a command."""
