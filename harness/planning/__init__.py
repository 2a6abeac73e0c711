"""What a sweep will do before it does anything: checks, passes, estimates."""
