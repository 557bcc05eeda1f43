"""The tiny models, a file for each family. Each has its models in `CASES`."""
