"""The `rookery` command and the ways to start workers."""
