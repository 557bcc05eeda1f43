"""From Hugging Face names and layouts to MaxText's: ops, rules, and the target tree they give."""
