"""The cloud for queues of tasks: the same server as cloud_api.py."""

from neurosurgeon.cli.process import script

main = script("cloud", "tasks_cloud_api.py")

if __name__ == "__main__":
    raise SystemExit(main())
