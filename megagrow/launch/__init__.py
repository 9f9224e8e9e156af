"""A family as jobs: what must be done, in which order, and two executors that do it.

`graph` lists the jobs and knows from the disk which are finished. `local` runs them on this machine, one after the
other. On a Slurm cluster `resources` says what each asks for, `preflight` and `edits` refuse what cannot be, `render`
makes a script of each, `submit` queues them, `attempts` is what a script asks while it runs, and `status` shows how
they go; `slurm` holds the commands.
"""
