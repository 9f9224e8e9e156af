"""Words that refusals of several formats share."""

WITHOUT = "--no-optimizer leaves it out"
