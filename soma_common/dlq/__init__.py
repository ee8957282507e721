"""Dead letters: events that could not be applied, kept verbatim and in order until they are."""
