"""Forward operators: what deepinv lacks, and the words of the command line."""
