"""The torture run: everything is killed at random, and a checker reads the whole history back."""
