"""The deployment phase: plan the split of a network from predicted latencies and a link."""

from neurosurgeon.cli.process import script

main = script("deployment", "deployment.py")

if __name__ == "__main__":
    raise SystemExit(main())
