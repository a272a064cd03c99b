"""Training one rank of one run; torch is imported here and below, not by what submits runs."""
