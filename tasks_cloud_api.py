"""The cloud for queues of tasks: it serves what cloud_api.py serves."""

from neurosurgeon.cli.process import script

main = script("cloud", "tasks_cloud_api.py")

if __name__ == "__main__":
    raise SystemExit(main())
