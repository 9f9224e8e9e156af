"""What goes into a stage: its source is compared, asked for where it is silent, and told apart from its storage."""
