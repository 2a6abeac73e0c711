"""The embedded demo: a small world of facts, a Llama trained on it, and its four multiple-choice tasks. No download anywhere."""
