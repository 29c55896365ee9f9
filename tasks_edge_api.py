"""The edge with a queue of tasks, many of them in flight."""

from neurosurgeon.cli.process import script

main = script("tasks_edge", "tasks_edge_api.py")

if __name__ == "__main__":
    raise SystemExit(main())
