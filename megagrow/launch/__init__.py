"""A family as jobs: what must be done, in which order, and an executor that does it.

`graph` lists the jobs and knows from the disk which are finished; `local` runs them on this machine, one after the
other. Other executors (a cluster's) take the same graph.
"""
