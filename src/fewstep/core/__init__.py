"""The nouns on which everything else is built."""
