"""Settings of a Trainer, models and callbacks together: each combination is right, or refused before the first step."""
