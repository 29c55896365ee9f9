"""The edge: measure the link, choose the partition point, run one task with the cloud."""

from neurosurgeon.cli.process import script

main = script("edge", "edge_api.py")

if __name__ == "__main__":
    raise SystemExit(main())
