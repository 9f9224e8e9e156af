"""A family as jobs: what must be done, in which order, and two executors that do it.

`graph` lists the jobs and reads from disk which of them are finished. `local` runs them on this machine, one after the
other. The other modules run them on a Slurm cluster: `resources` computes what each job requests, `preflight`
rejects what cannot work, `frozen` keeps the family as it was launched, `render` writes a script for each job, `submit`
queues the scripts, `attempts` decides what a script does next while it runs, and `status` shows the progress. `slurm`
holds Slurm's commands.
"""
