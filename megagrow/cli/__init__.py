"""The command line: thin verbs over the rooms, each of which is imported only when its verb is asked for."""
