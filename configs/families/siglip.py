"""Placeholder for the SigLIP tower of Gemma 3."""
