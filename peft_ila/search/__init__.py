"""Where scores come from: a stable delta, and what each part of it is worth."""
