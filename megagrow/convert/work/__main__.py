"""A worker of a `WorkerPool`, as a process: `python -m megagrow.convert.work`."""

from megagrow.convert.work.worker import main

main()
