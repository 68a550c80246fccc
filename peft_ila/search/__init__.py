"""The search: when stage 1 is stable, and the scores of stage 2."""
