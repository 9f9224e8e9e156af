"""The command line: thin verbs over the other subpackages, each imported only when a verb needs it."""
