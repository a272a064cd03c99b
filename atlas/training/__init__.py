"""Training one rank of one run; torch is imported here and below, and not by what submits runs."""
