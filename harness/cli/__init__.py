"""What a person types: the commands, completion, live progress, and what `status`, `show`, `diagnose` and `doctor` print."""
