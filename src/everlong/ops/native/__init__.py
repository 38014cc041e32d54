"""The chunk scan in C, an optional back end for CPUs."""
